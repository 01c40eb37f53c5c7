"""What saving and loading need of the other ranks."""

from __future__ import annotations

from typing import Any, Protocol

from chatgot.config.errors import ChatGoTError


class Ranks(Protocol):
    """Collective decisions; chatgot.engine.process_group.ControlGroup is the real one."""

    rank: int
    world_size: int

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        ...

    def from_rank_0(self, value: Any) -> Any:
        """Rank 0's value."""
        ...

    def barrier(self) -> None:
        """Wait for every rank."""
        ...

    def agree(self, error: ChatGoTError | None) -> None:
        """Raise on all ranks if any had an error."""
        ...
