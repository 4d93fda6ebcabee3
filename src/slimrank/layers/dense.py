"""The weight of a dense layer, whichever way round it is stored."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def weight_of(module: nn.Module) -> Tensor:
    """The weight as m x n = out x in, a view (a Conv1D stores the transpose)."""
    weight: Tensor = module.weight.data  # type: ignore[assignment]
    return weight.t() if isinstance(module, Conv1D) else weight
