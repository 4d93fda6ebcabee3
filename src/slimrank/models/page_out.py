"""Release the memory of weights that are mapped from a file.

transformers maps safetensors files into memory, so a weight takes none until it is used. After a block is done its
pages are offered to the kernel. If they are used again, they come back from the file (MADV_PAGEOUT, Linux 5.4). Other
systems keep the pages.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

from torch import nn

_MADV_PAGEOUT = 21
_MAPS = Path("/proc/self/maps")


def page_out(module: nn.Module) -> None:
    """Offer the pages of a module's file-mapped weights to the kernel; weights in ordinary memory are left alone."""
    if sys.platform != "linux" or not _MAPS.is_file():
        return
    mapped = _weight_files()
    libc = ctypes.CDLL(None, use_errno=True)
    for p in module.parameters():
        start, size = p.data_ptr(), p.numel() * p.element_size()
        if any(low <= start and start + size <= high for low, high in mapped):
            first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            last = (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first:
                libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_PAGEOUT)


def _weight_files() -> list[tuple[int, int]]:
    """List the address ranges that are mapped from safetensors files."""
    ranges = []
    for line in _MAPS.read_text().splitlines():
        if line.endswith(".safetensors"):
            low, _, high = line.split()[0].partition("-")
            ranges.append((int(low, 16), int(high, 16)))
    return ranges
