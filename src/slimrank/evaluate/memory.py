"""Peak memory of this process."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def peak_memory() -> int:
    """Bytes: the largest resident size of this process so far, or of the accelerator's memory if that is more."""
    device = torch.accelerator.max_memory_allocated() if _counts_memory() else 0
    return max(_host_peak(), device)


def _host_peak() -> int:
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss would include what the parent process held before it started this one
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if line is not None:
            return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _counts_memory() -> bool:
    return torch.accelerator.is_available() and hasattr(torch.accelerator, "max_memory_allocated")
