"""What DeepSpeed would write in a save: written at once, or copied to memory that training no longer changes, to be
written while training goes on.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chatgot.checkpoint import faults
from chatgot.engine import guards


@dataclass(frozen=True)
class Snapshot:
    """A state dict as it was."""

    graph: bytes
    """Everything but the tensors, pickled, with numbers in their places."""
    tensors: tuple[torch.Tensor, ...]
    """On the CPU. Tensors that shared memory share it here too, so that torch.save writes it once, as it would have."""

    def rebuild(self) -> Any:
        """The state dict."""
        return _Unpickler(self.graph, self.tensors).load()


class Snapshots:
    """Takes snapshots, the next one into the memory of the one before: memory that has been written to once is several
    times faster.

    On CUDA that memory is pinned. It is as large as what this rank saves, and is kept until the end of the run.
    """

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []
        self._used = 0

    def reuse(self) -> None:
        """The snapshots taken so far are no longer needed."""
        del self._buffers[self._used :]  # the layout of what is saved has changed
        self._used = 0

    def take(self, state: Any) -> Snapshot:
        """Copy a state dict. Work that was queued on a device is waited for.

        Raises:
            ValueError: a tensor in it is not dense.
        """
        copies: dict[int, torch.Tensor] = {}
        tensors: list[torch.Tensor] = []
        queued = False

        def copied(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal queued
            storage = tensor.untyped_storage()
            key = storage._cdata  # what torch.save knows a storage by
            if key not in copies:
                whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
                on_cuda = storage.device.type == "cuda"
                copies[key] = self._buffer(whole.numel(), pinned=on_cuda)
                copies[key].copy_(whole, non_blocking=True)
                queued = queued or on_cuda
            return torch.empty(0, dtype=tensor.dtype).set_(
                copies[key].untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
            )

        def keep(tensor: torch.Tensor) -> int:
            if tensor.layout != torch.strided or tensor.is_quantized:
                raise ValueError(
                    f"a {tensor.layout} tensor of {tensor.dtype} cannot be copied for saving in the background"
                )
            tensors.append(_like(copied(tensor.detach()), tensor))
            return len(tensors) - 1

        file = io.BytesIO()
        _Pickler(file, keep).dump(state)
        if queued:
            torch.cuda.synchronize()
        return Snapshot(file.getvalue(), tuple(tensors))

    def _buffer(self, size: int, pinned: bool) -> torch.Tensor:
        index = self._used
        self._used += 1
        if (
            index < len(self._buffers)
            and self._buffers[index].numel() == size
            and self._buffers[index].is_pinned() == pinned
        ):
            return self._buffers[index]
        fresh = torch.empty(size, dtype=torch.uint8, pin_memory=pinned and size > 0)
        self._buffers[index : index + 1] = [fresh]
        return fresh


@contextlib.contextmanager
def file_operations(
    engine: Any, snapshots: list[tuple[Path, Snapshot]] | None, memory: Snapshots
) -> Iterator[list[OSError | RuntimeError]]:
    """Let this rank's file operations note their failure instead of raising it (see guards.file_operations), and put
    what is to be written into `snapshots`, if given. torch.save reports a full disk as a RuntimeError.
    """
    failures: list[OSError | RuntimeError] = []

    def noted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(*args: Any, **kwargs: Any) -> Any:
            try:
                paths = [Path(value).name for value in (*args, *kwargs.values()) if isinstance(value, (str, Path))]
                faults.operation(" ".join([operation.__name__.strip("_"), *paths]))
                return operation(*args, **kwargs)
            except (OSError, RuntimeError) as error:
                failures.append(error)

        return attempt

    def copied(state_dict: Any, path: str) -> None:
        try:
            assert snapshots is not None
            snapshots.append((Path(path), memory.take(state_dict)))
        except (RuntimeError, ValueError) as error:  # no memory for the copy
            failures.append(RuntimeError(f"no copy for saving in the background (chatgot.checkpoint.async): {error}"))

    def ours(name: str, theirs: Callable[..., Any]) -> Callable[..., Any]:
        return copied if name == "save" and snapshots is not None else noted(theirs)

    with guards.file_operations(engine, ours):
        yield failures


def _like(copy: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """`copy` with what torch.save writes of a tensor besides its values; DeepSpeed marks some with a number (ds_id)."""
    if isinstance(original, torch.nn.Parameter):
        copy = torch.nn.Parameter(copy, requires_grad=original.requires_grad)
    copy.requires_grad_(original.requires_grad)
    for name, value in vars(original).items():
        setattr(copy, name, value)
    return copy


class _Pickler(pickle.Pickler):
    """Gives each tensor to `keep`, once, and writes the number that it returns."""

    def __init__(self, file: io.BytesIO, keep: Callable[[torch.Tensor], int]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._keep = keep
        self._numbers: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, torch.Tensor):
            return None
        if id(obj) not in self._numbers:
            self._numbers[id(obj)] = self._keep(obj)
        return self._numbers[id(obj)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, graph: bytes, tensors: tuple[torch.Tensor, ...]) -> None:
        super().__init__(io.BytesIO(graph))
        self._tensors = tensors

    def persistent_load(self, pid: Any) -> torch.Tensor:
        return self._tensors[pid]
