"""Which of several processes this is, as torchrun and accelerate tell it."""

from __future__ import annotations

import os

import torch.distributed as dist


def world_size() -> int:
    """Return the number of processes that train together."""
    return max(1, int(os.environ.get("WORLD_SIZE", "1")))


def is_first() -> bool:
    """Tell whether this process writes what all of them have made."""
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_all() -> None:
    """Go on when all processes are here: the first one deletes states that the others read."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
