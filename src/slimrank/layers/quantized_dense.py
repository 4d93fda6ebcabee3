"""Dense weights of few bits."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from slimrank.layers.dense import weight_of
from slimrank.layers.quantized_forms import Part, QuantizedForm, Rank, rounded_part
from slimrank.linalg.regression import Regression


class QuantizedDense(QuantizedForm):
    """The weight itself, rounded."""

    base: ClassVar[str] = "dense"

    @classmethod
    def choices(cls, m: int, n: int, group: int | None) -> list[tuple[str, Rank]]:
        """See `QuantizedForm.choices`."""
        return [("dense:{}", "dense")]

    def parts(self, m: int, n: int, rank: int) -> list[Part]:
        """See `QuantizedForm.parts`."""
        return [Part("", m, n, self.first)]

    def empty(self, m: int, n: int, rank: int, dtype: torch.dtype) -> nn.Linear:
        """See `QuantizedForm.empty`."""
        return self.parts(m, n, rank)[0].linear(dtype=dtype)

    def nearest(self, start: Any, dtype: torch.dtype) -> nn.Linear:
        """See `QuantizedForm.nearest`."""
        return rounded_part(weight_of(start).double(), None, self.first, dtype)[0]

    def fit(self, problem: Regression, start: nn.Module, rank: int, dtype: torch.dtype) -> nn.Module:
        """See `QuantizedForm.fit`: the least-squares weight is rounded."""
        return rounded_part(problem.solution(), problem.gram, self.first, dtype)[0]
