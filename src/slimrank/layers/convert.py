"""Factors A and B to layers of any form, and back; the names that older code imports from here."""

from __future__ import annotations

import torch
from torch import Tensor

from slimrank.layers.base import CompressedLinear, compressed_layers
from slimrank.layers.base import load_tensors as hold
from slimrank.layers.forms import layer_form, pivot_layer

__all__ = ["CompressedLinear", "compressed_layers", "give_b", "hold", "pair_of", "pivot_layer", "stored_layer"]


def stored_layer(
    form: str, A: Tensor, B: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype
) -> CompressedLinear:
    """Return the layer y = B A x + bias in a form: see `LayerForm.build`."""
    return layer_form(form).build(A, B, bias, dtype)


def pair_of(layer: CompressedLinear) -> tuple[Tensor, Tensor]:
    """Return `layer.factors()`."""
    return layer.factors()


def give_b(layer: CompressedLinear, B: Tensor) -> None:
    """Call `layer.set_b(B)`."""
    layer.set_b(B)
