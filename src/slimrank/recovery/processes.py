"""What training with several processes needs besides `slimrank.processes`: accelerate connects them."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from accelerate import PartialState

from slimrank.errors import RecipeError
from slimrank.processes import started_together


def rank() -> int:
    """Return the number of this process."""
    return int(os.environ.get("RANK", "0"))


def join_others(device: torch.device) -> None:
    """Make ready to wait for the other processes, if there are any, as training is going to."""
    if started_together() > 1:
        PartialState(cpu=device.type == "cpu")


def check_sharding(device: torch.device) -> None:
    """Make sure that weights which are to be sharded would be.

    Raises:
        RecipeError: FSDP is asked for on a CPU, where accelerate trains with whole copies instead, silently.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and device.type == "cpu":
        raise RecipeError(
            "FSDP is asked for, and accelerate shards weights on accelerators only, not on a CPU.",
            "accelerate launch --multi_cpu, which trains with a whole copy in every process",
        )


def wait_for_all() -> None:
    """Go on when all processes are here: the first one deletes states that the others read."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
