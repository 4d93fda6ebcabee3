"""The precision that products are computed in: float32, or bfloat16 by torch.autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slimrank.errors import RecipeError
from slimrank.models.placement import has_bfloat16
from slimrank.models.recording import Patched, first_of


def need_bfloat16(device: torch.device, hint: str) -> None:
    """Make sure that a device multiplies in bfloat16 by itself.

    Raises:
        RecipeError: it does not.
    """
    if not has_bfloat16(device):
        raise RecipeError(f"the device '{device}' has no products in bfloat16.", hint)


def autocasts(asked: str, device: torch.device) -> bool:
    """Tell whether blocks compute their products in bfloat16 for a `compute_dtype` on a device.

    Raises:
        RecipeError: bfloat16 is asked for, and the device has no such products.
    """
    if asked != "bfloat16":
        return False
    need_bfloat16(device, "--compute-dtype float32 or auto")
    return True


class Autocast(Patched):
    """Computes the products of every block in bfloat16; hidden states come out as they went in."""

    def stand_in(self, index: int) -> Callable[..., Any]:
        """See `Patched`."""
        own = self.blocks[index].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            with torch.autocast(hidden.device.type, torch.bfloat16):
                output = own(*args, **kwargs)
            return _with_hidden(output, first_of(output).to(hidden.dtype))

        return forward


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    """Return the output of a block with these hidden states."""
    if first_of(output) is hidden:
        return output
    if not isinstance(output, (tuple, list)):
        return hidden
    changed = (hidden, *output[1:])
    return type(output)(*changed) if hasattr(output, "_fields") else type(output)(changed)
