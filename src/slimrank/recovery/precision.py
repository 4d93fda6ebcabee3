"""Whether training computes its products in bfloat16."""

from __future__ import annotations

import torch

from slimrank.methods.recoverer import RecoverOptions
from slimrank.models.placement import has_bfloat16
from slimrank.models.precision import need_bfloat16


def computes_bfloat16(options: RecoverOptions, device: torch.device) -> bool:
    """Tell whether products are computed in bfloat16 on a device.

    Raises:
        RecipeError: it is asked for, and the device has no such products.
    """
    if options.compute_dtype == "float32":
        return False
    if options.compute_dtype == "bfloat16":
        need_bfloat16(device, "compute_dtype=float32")
    return has_bfloat16(device)
