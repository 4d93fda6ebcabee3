"""Peak memory of this process."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def peak_memory(device: torch.device) -> int:
    """Return the peak resident bytes of this process, or the peak bytes on the device if that is more."""
    return max(_host_peak(), _device_peak(device))


def _device_peak(device: torch.device) -> int:
    """Return the peak bytes on the device; 0 if torch does not count: on a CPU, and on mps in most versions."""
    if device.type == "cpu" or not hasattr(torch.accelerator, "max_memory_allocated"):
        return 0
    try:
        return torch.accelerator.max_memory_allocated(device)
    except RuntimeError:
        return 0


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
