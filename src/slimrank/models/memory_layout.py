"""The order in which the numbers of a weight lie in memory: by rows, or by columns, whichever is read faster.

A step of decoding multiplies each weight by one vector. How fast a library does that depends on the shape: of a tall
weight in float32 it may read the columns 1.7 times as fast as the rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.layers.base import CompressedLinear
from slimrank.layers.packed import is_joined, reader
from slimrank.models.timing import layer_seconds

STEP = 32  # rows and columns by which shapes are alike
GAIN = 0.03  # of the time; less is not worth a change


def choose_layouts(layers: Iterable[CompressedLinear]) -> int:
    """Lay out the parts of compressed layers on a CPU as they are read fastest, in place; shapes and names stay.

    Parts that are computed together with others keep their memory.

    Returns:
        How many parts lie by columns.
    """
    known: dict[Any, bool] = {}
    changed = 0
    for part in (part for layer in layers for part in _parts(layer)):
        weight = part.weight
        key = (-(-weight.shape[0] // STEP), -(-weight.shape[1] // STEP), weight.dtype)
        if key not in known:
            known[key] = _by_columns(weight)
        part.weight.data = _in_columns(weight.data) if known[key] else weight.data.contiguous()
        changed += known[key]
    return changed


def by_rows(layers: Iterable[CompressedLinear]) -> None:
    """Lay out all parts by rows, as they are stored, in place."""
    for part in (part for layer in layers for part in _parts(layer)):
        part.weight.data = part.weight.data.contiguous()


def _parts(layer: CompressedLinear) -> list[nn.Linear]:
    """Return the parts of a layer that are plain linear layers on a CPU, with memory of their own."""
    joined = reader(layer) if is_joined(layer) else None
    parts = [part for part in layer.children() if type(part) is nn.Linear and part is not joined]
    return [part for part in parts if part.weight.device.type == "cpu" and part.weight.numel()]


def _by_columns(weight: Tensor) -> bool:
    """Measure one product with a vector in both orders."""
    rows, columns = (nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta") for _ in range(2))
    rows.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    columns.weight = nn.Parameter(_in_columns(weight.detach()), requires_grad=False)
    x = torch.ones(1, 1, weight.shape[1], dtype=weight.dtype)
    by_row, by_column = layer_seconds([rows, columns], x)
    return by_column < (1 - GAIN) * by_row


def _in_columns(weight: Tensor) -> Tensor:
    return weight.t().contiguous().t()
