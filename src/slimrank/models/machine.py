"""How fast a device multiplies, measured; estimates of time go by it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from slimrank.models.placement import has_bfloat16


@dataclass(frozen=True)
class Machine:
    """Measured speed of the compute device, in floating point operations per second.

    Attributes:
        float32: in single precision.
        float64: in double precision.
        products: in the precision of the blocks' products in calibration and refinement.
        mixed: in the mixed precision of training: in bfloat16, or in float32 where the device has no such products.
    """

    float32: float
    float64: float
    products: float
    mixed: float


def measure_machine(device: torch.device, bfloat16: bool) -> Machine:
    """Measure the device by matrix products, for a fraction of a second.

    Args:
        device: what computes.
        bfloat16: whether the blocks' products are in bfloat16; else they count as float32.
    """
    float32 = _rate(device, torch.float32)
    float64 = float32 / 8 if device.type == "mps" else _rate(device, torch.float64)
    mixed = _rate(device, torch.bfloat16) if has_bfloat16(device) else float32
    return Machine(float32, float64, mixed if bfloat16 else float32, mixed)


def _rate(device: torch.device, dtype: torch.dtype) -> float:
    a = torch.ones(768, 768, dtype=dtype, device=device)
    _time(lambda: a @ a)
    return 2 * 768**3 / min(_time(lambda: a @ a) for _ in range(4))


def _time(work: Callable[[], torch.Tensor]) -> float:
    start = time.perf_counter()
    work().sum().item()
    return time.perf_counter() - start
