"""The order in which the numbers of a weight lie in memory: by rows, or by columns, whichever is read faster.

A step of decoding multiplies each weight by one vector. How fast a library does that depends on the shape: of a tall
weight in float32 it may read the columns 1.7 times as fast as the rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.layers.base import CompressedLinear
from slimrank.layers.packed import lie_by_columns, lie_by_rows, own_parts
from slimrank.models.timing import layer_seconds

STEP = 32  # rows and columns by which shapes are alike
GAIN = 0.03  # of the time; less is not worth a change


def choose_layouts(layers: Iterable[CompressedLinear], known: dict[Any, bool] | None = None) -> int:
    """Lay out the parts of compressed layers on a CPU as they are read fastest, in place; shapes and names stay.

    Parts that are computed together with others keep their memory, and so do weights that several parts hold:
    transformers cannot save such weights by columns.

    Args:
        layers: of one model.
        known: what earlier calls have found, by shape and dtype; more is added.

    Returns:
        How many parts lie by columns.
    """
    known = {} if known is None else known
    changed = 0
    parts = [part for layer in layers for _, part in own_parts(layer)]
    held = Counter(id(part.weight) for part in parts)
    for part in (part for part in parts if held[id(part.weight)] == 1):
        weight = part.weight
        key = (-(-weight.shape[0] // STEP), -(-weight.shape[1] // STEP), weight.dtype)
        if key not in known:
            known[key] = _by_columns(weight)
        (lie_by_columns if known[key] else lie_by_rows)(part)
        changed += known[key]
    return changed


def _by_columns(weight: Tensor) -> bool:
    """Measure one product with a vector in both orders."""
    rows, columns = (nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta") for _ in range(2))
    for part, lie in ((rows, lie_by_rows), (columns, lie_by_columns)):
        part.weight = nn.Parameter(weight.detach(), requires_grad=False)
        lie(part)
    x = torch.ones(1, 1, weight.shape[1], dtype=weight.dtype)
    by_row, by_column = layer_seconds([rows, columns], x)
    return by_column < (1 - GAIN) * by_row
