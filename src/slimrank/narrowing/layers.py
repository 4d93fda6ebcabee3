"""Take hidden units out of linear layers, in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from slimrank.layers.dense import weight_of
from slimrank.models.mlps import Rows, rows_of_units


def set_weight(layer: Any, weight: Tensor) -> None:
    """Give a layer another weight (m x n), of any shape, in its own dtype and place."""
    old = layer.weight
    stored = weight.t() if isinstance(layer, Conv1D) else weight
    layer.weight = nn.Parameter(stored.to(old.device, old.dtype).contiguous(), old.requires_grad)
    m, n = weight_of(layer).shape
    if isinstance(layer, Conv1D):
        layer.nf, layer.nx = m, n
    else:
        layer.out_features, layer.in_features = m, n


def set_bias(layer: Any, bias: Tensor) -> None:
    """Give a layer another bias, of any length, in its own dtype and place."""
    layer.bias = nn.Parameter(bias.to(layer.bias.device, layer.bias.dtype).contiguous(), layer.bias.requires_grad)


def keep_units(model: nn.Module, makers: Mapping[str, Rows], width: int, kept: Tensor) -> None:
    """Keep some hidden units in the layers that make them.

    Args:
        model: changed in place.
        makers: path -> which rows make a unit, see `Mlp`.
        width: number of units now.
        kept: numbers of those that stay.
    """
    for path, how in makers.items():
        layer: Any = model.get_submodule(path)
        rows = rows_of_units(kept.to(layer.weight.device), width, how)
        set_weight(layer, weight_of(layer)[rows])
        if layer.bias is not None:
            set_bias(layer, layer.bias.data[rows])
