"""Move a part of a model to the compute device inside a context, and restore it unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from slimrank.errors import RecipeError


def resolve_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is the accelerator if there is one, else the CPU.

    Raises:
        RecipeError: an unknown or absent device.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"'{name}' is not a device.", "use auto, cpu, cuda, cuda:1, mps or xpu") from error
    if device.type == "cpu":
        return device
    if accelerator is None or accelerator.type != device.type:
        raise RecipeError(f"this machine has no '{device.type}' device.", "use --device cpu or auto")
    if device.index is not None and device.index >= torch.accelerator.device_count():
        raise RecipeError(f"this machine has no device '{device}'.", f"use --device {device.type}:0")
    return device


def solving_device(device: torch.device) -> torch.device:
    """Return the device of float64 work: the device itself, or the CPU if it has no float64 (mps)."""
    return torch.device("cpu") if device.type == "mps" else device


def _tensors(part: nn.Module | torch.Tensor) -> Iterable[torch.Tensor]:
    return (part,) if isinstance(part, torch.Tensor) else (*part.parameters(), *part.buffers())


@contextmanager
def placed(parts: Iterable[nn.Module | torch.Tensor], device: torch.device, upcast: bool) -> Iterator[None]:
    """Place parameters and buffers on `device` inside the context, and restore their own storage after it.

    Args:
        parts: modules, all of whose parameters and buffers count, or single ones; tied parameters are moved once.
        device: where they are needed.
        upcast: also cast 16-bit parameters to float32. Parameters are never cast down, so what a
            model keeps in float32 stays there.
    """
    saved: list[tuple[torch.Tensor, torch.Tensor]] = []
    tensors = {id(t): t for part in parts for t in _tensors(part)}
    try:
        for tensor in tensors.values():
            small = upcast and tensor.is_floating_point() and tensor.element_size() < 4
            moved = tensor.data.to(device, torch.float32 if small else tensor.dtype)
            if moved.data_ptr() != tensor.data_ptr() or moved.device != tensor.device:
                saved.append((tensor, tensor.data))
                tensor.data = moved
        yield
    finally:
        for tensor, original in saved:
            tensor.data = original


def has_bfloat16(device: torch.device) -> bool:
    """Tell whether a device multiplies in bfloat16 by itself, and not by way of float32."""
    module: Any = torch.get_device_module(device)
    if device.type == "cpu":
        flags = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(module, flag, bool)() for flag in flags)
    supported = getattr(module, "is_bf16_supported", None)
    return bool(supported is not None and supported(including_emulation=False))
