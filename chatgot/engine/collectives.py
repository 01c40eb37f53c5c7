"""Counts DeepSpeed's collectives, so that a rank that lost its way inside a micro-batch can meet the others again.

Every rank issues the same collectives in the same order, whatever the size of its batch. A rank that ran out of memory
after n of them runs a tiny batch from the beginning: its first n collectives are left out, because the others have had
them, and the rest is real.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_NAMES = (
    "all_reduce",
    "inference_all_reduce",
    "all_reduce_coalesced",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_base",
    "all_gather_coalesced",
    "all_to_all_single",
    "all_to_all",
    "barrier",
)
"""Of DeepSpeed's backend object (comm/torch.py), through which all of its communication goes."""


class _Done:
    """In place of the handle of a collective that was left out."""

    def wait(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


class Collectives:
    """Of one process: wraps the methods of DeepSpeed's backend object, once."""

    def __init__(self) -> None:
        self.issued = 0
        """Since `begin`."""
        self.left_out = 0
        """Still to be left out after `begin`."""
        self.muted = False
        """Leave out all of them until `begin`."""
        self._inside = False

    @classmethod
    def of_process(cls) -> Collectives:
        """The one that counts for this process. DeepSpeed's communication must be initialised."""
        from deepspeed.comm import comm

        backend: Any = comm.cdb
        if not isinstance(getattr(backend, "chatgot_collectives", None), cls):
            counter = backend.chatgot_collectives = cls()
            for name in _NAMES:
                setattr(backend, name, counter._counted(getattr(backend, name)))
            counter._trust_traces()
        return backend.chatgot_collectives

    def begin(self) -> None:
        """The first module of a forward pass is about to run."""
        self.issued = 0
        self.muted = False

    def _trust_traces(self) -> None:
        """Before a forward, ZeRO-3 compares its trace between the ranks while it learns it: not when the answer is left
        out.
        """
        from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

        compare: Any = coordinator.assert_ints_same_as_other_ranks

        def assert_ints_same_as_other_ranks(ints: Any) -> None:
            if not self.muted:
                compare(ints)

        coordinator.assert_ints_same_as_other_ranks = assert_ints_same_as_other_ranks

    def _counted(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(operation)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # some are made of others
                return operation(*args, **kwargs)
            if self.muted:
                return _Done()
            if self.left_out:
                self.left_out -= 1
                self.issued += 1
                return _Done()
            self._inside = True
            try:
                result = operation(*args, **kwargs)
            finally:
                self._inside = False
            self.issued += 1
            return result

        return counted
