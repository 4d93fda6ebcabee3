"""Whether training computes its products in bfloat16."""

from __future__ import annotations

import torch

from slimrank.errors import RecipeError
from slimrank.methods.recoverer import RecoverOptions


def computes_bfloat16(options: RecoverOptions, device: torch.device) -> bool:
    """Tell whether products are computed in bfloat16 on a device.

    Raises:
        RecipeError: it is asked for, and the device has no such products.
    """
    if options.compute_dtype == "float32":
        return False
    native = has_bfloat16(device)
    if options.compute_dtype == "bfloat16" and not native:
        raise RecipeError(f"the device '{device}' has no products in bfloat16.", "compute_dtype=float32")
    return native


def has_bfloat16(device: torch.device) -> bool:
    """Tell whether a device multiplies in bfloat16 by itself."""
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
