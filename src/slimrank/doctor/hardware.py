"""The CPU and every accelerator."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def devices() -> list[dict[str, Any]]:
    """List the CPU and every accelerator: memory in bytes, and whether it computes in bfloat16."""
    import torch

    found = [_cpu()]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        found += [_accelerator(torch.device(kind.type, i)) for i in range(torch.accelerator.device_count())]
    return found


def _cpu() -> dict[str, Any]:
    """Describe the CPU; its memory is that of the container, if that has a limit."""
    import psutil
    import torch

    memory = psutil.virtual_memory()
    total = min(memory.total, _container_limit())
    return {
        "device": "cpu",
        "name": platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": total,
        "free": min(memory.available, total),
        "bfloat16": True,
    }


def _container_limit(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the bytes that a Linux container may take; infinity without a limit."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = root / name
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            return int(text)
    return float("inf")


def _accelerator(device: torch.device) -> dict[str, Any]:
    import torch

    module: Any = torch.get_device_module(device)
    if hasattr(module, "mem_get_info"):
        free, total = module.mem_get_info(device)
    else:  # mps
        total = module.recommended_max_memory()
        free = total - module.driver_allocated_memory()
    name = module.get_device_name(device) if hasattr(module, "get_device_name") else device.type
    return {"device": str(device), "name": name, "memory": total, "free": free, "bfloat16": _bfloat16(module, device)}


def _bfloat16(module: Any, device: torch.device) -> bool:
    """Tell whether the device computes in bfloat16 itself; if its module does not say, by trying."""
    import torch

    if hasattr(module, "is_bf16_supported"):
        with module.device(device):
            return bool(module.is_bf16_supported(including_emulation=False))
    try:
        one = torch.ones(2, 2, dtype=torch.bfloat16, device=device)
        return bool((one @ one)[0, 0] == 2)
    except (RuntimeError, TypeError):
        return False
