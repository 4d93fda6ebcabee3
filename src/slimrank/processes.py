"""Several processes that work on one job: what they share, sum and split.

torchrun starts them, and says in the environment which of them this is. All run the same code, each on its part of the
text; the first, the leader, writes the files.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from slimrank.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # that a process waits: the leader may allocate for hours, and torchrun sees who has died

_joined: ContextVar[bool] = ContextVar("joined", default=False)
_alone: ContextVar[bool] = ContextVar("alone", default=False)


@dataclass(frozen=True)
class Processes:
    """The processes of a job. Every method but `mine` is called by all of them, in the same order.

    Attributes:
        rank: the number of this one.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def leader(self) -> bool:
        """Tell whether this process writes what all have made."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """Return the part of some items that this process works on; parts differ by one item at most."""
        return items[len(items) * self.rank // self.count : len(items) * (self.rank + 1) // self.count]

    def share(self, value: T) -> T:
        """Return what the leader calls this with."""
        return self.all(value)[0]

    def all(self, value: T) -> list[T]:
        """Return what each process calls this with."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        with _explained(self):
            dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Go on when all processes are here."""
        self.all(None)

    def add_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place."""
        return self._reduced(tensor, "SUM")

    def largest_(self, tensor: Tensor) -> Tensor:
        """Take the largest numbers of all processes, in place."""
        return self._reduced(tensor, "MAX")

    def _reduced(self, tensor: Tensor, operation: str) -> Tensor:
        if self.count == 1:
            return tensor
        import torch.distributed as dist

        with _explained(self):
            dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
        return tensor

    def collect(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of all processes to the leader, on the CPU, and nothing to the others."""
        if self.count == 1:
            return dict(tensors)
        kinds = self.all({name: (t.shape, t.dtype) for name, t in tensors.items()})
        if self.leader:
            return {**tensors, **self._received(kinds)}
        import torch.distributed as dist

        with _explained(self):
            for tensor in tensors.values():
                dist.send(tensor.cpu().contiguous(), 0)
        return {}

    def _received(self, kinds: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        import torch
        import torch.distributed as dist

        found: dict[str, Tensor] = {}
        with _explained(self):
            for source, theirs in enumerate(kinds[1:], 1):
                for name, (shape, dtype) in theirs.items():
                    found[name] = torch.empty(shape, dtype=dtype)
                    dist.recv(found[name], source)
        return found


def started_together() -> int:
    """Return how many processes torchrun or accelerate has started for this job."""
    return max(1, int(os.environ.get("WORLD_SIZE", "1")))


def is_leader() -> bool:
    """Tell whether this process writes what all make, before they are connected, too."""
    return int(os.environ.get("RANK", "0")) == 0


def processes() -> Processes:
    """Return the processes that work together now: those inside `together`, less those inside `alone`.

    Elsewhere each process works by itself, whatever another library has connected it to.
    """
    if not _joined.get() or _alone.get():
        return Processes()
    return Processes(int(os.environ["RANK"]), started_together())


@contextmanager
def together() -> Iterator[None]:
    """Let the processes that torchrun has started work together inside the context; they stay connected afterwards.

    gloo carries tensors of the CPU, NCCL those of GPUs. Of several devices, each process takes one as its default.

    Raises:
        RunError: another process ended.
    """
    if started_together() == 1:
        yield
        return
    if not _connected():
        _connect()
    before = _joined.set(True)
    try:
        yield
        processes().wait()
    finally:
        _joined.reset(before)


def _connect() -> None:
    import torch
    import torch.distributed as dist

    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count())
    with _explained(Processes(int(os.environ["RANK"]), started_together())):
        dist.init_process_group(None if torch.accelerator.is_available() else "gloo", timeout=PATIENCE)
    atexit.register(_disconnect)


@contextmanager
def alone() -> Iterator[None]:
    """Let this process work by itself inside the context."""
    before = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(before)


def by_leader(compute: Callable[[], T]) -> T:
    """Return what the leader computes; the others wait."""
    found: Any = None
    if processes().leader:
        with alone():
            found = compute()
    return processes().share(found)


def _disconnect() -> None:
    """Disconnect at the end of the program; a second connection in one program would not come about."""
    if _connected():
        import torch.distributed as dist

        dist.destroy_process_group()


def _connected() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


@contextmanager
def _explained(which: Processes) -> Iterator[None]:
    """Say that another process has ended, if that is why these can no longer speak with one another."""
    try:
        yield
    except RuntimeError as error:
        raise RunError(
            f"process {which.rank} of {which.count} cannot reach the others: {str(error).splitlines()[0]}",
            "see the message of the process that ended first; the same command again resumes",
        ) from error
