"""Peak memory of this process."""

from __future__ import annotations

import sys

import torch


def peak_memory() -> int:
    """Bytes: the largest resident size of this process so far, or of the accelerator's memory if that is more."""
    if sys.platform == "win32":
        import psutil

        host = int(psutil.Process().memory_info().peak_wset)
    else:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    device = torch.accelerator.max_memory_allocated() if _counts_memory() else 0
    return max(host, device)


def _counts_memory() -> bool:
    return torch.accelerator.is_available() and hasattr(torch.accelerator, "max_memory_allocated")
