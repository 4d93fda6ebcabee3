"""Whether training computes its products in bfloat16."""

from __future__ import annotations

import torch

from slimrank.errors import RecipeError
from slimrank.methods.recoverer import RecoverOptions
from slimrank.models.placement import has_bfloat16


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
