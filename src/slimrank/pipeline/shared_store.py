"""The store of several processes: the leader writes and decides, all read the same disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from slimrank.processes import Processes
from slimrank.store import Store


class SharedStore(Store):
    """A store that several processes use. All call everything but `load` in the same order.

    Args:
        folder: on a disk that all see.
        processes: those that share it.
    """

    def __init__(self, folder: Path, processes: Processes) -> None:
        super().__init__(folder)
        self.processes = processes

    def has(self, name: str) -> bool:
        """Tell whether the leader sees the tensors `name`."""
        return self.processes.share(super().has(name))

    def save(self, name: str, tensors: dict[str, Tensor], about: dict[str, Any] | None = None) -> None:
        """Store the leader's tensors and JSON record; the others go on when they are there."""
        if self.processes.leader:
            super().save(name, tensors, about)
        self.processes.wait()

    def save_parts(self, name: str, tensors: dict[str, Tensor], about: dict[str, Any] | None = None) -> None:
        """Store the tensors of all processes, and the leader's record."""
        self.save(name, self.processes.collect(tensors), about)

    def drop(self, name: str) -> None:
        """Delete what is stored as `name`."""
        if self.processes.leader:
            super().drop(name)
