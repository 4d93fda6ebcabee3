"""Pairs of factors of few bits."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from slimrank.layers.low_rank import LowRankLinear
from slimrank.layers.quantized_forms import Part, QuantizedForm, rounded_part
from slimrank.linalg.regression import Regression, best_b


class QuantizedPair(QuantizedForm):
    """A, rounded first, and B, which makes up for that before it is rounded on A's outputs.

    B is made orthonormal first, so that an error of A weighs as much in all directions.
    """

    base: ClassVar[str] = "pair"

    def parts(self, m: int, n: int, rank: int) -> list[Part]:
        """See `QuantizedForm.parts`."""
        return [Part("A", rank, n, self.first), Part("B", m, rank, self.other)]

    def unrounded(self, m: int, n: int, rank: int, dtype: torch.dtype) -> LowRankLinear:
        """See `QuantizedForm.unrounded`."""
        return LowRankLinear(n, m, rank, dtype=dtype)

    def fit(self, problem: Regression, start: Any, rank: int, dtype: torch.dtype) -> LowRankLinear:
        """See `QuantizedForm.fit`."""
        a, b = (factor.to(problem.gram) for factor in start.factors())
        first, a = rounded_part(torch.linalg.qr(b).R @ a, problem.gram, self.first, dtype)
        other, _ = rounded_part(best_b(problem, a), a @ problem.gram @ a.t(), self.other, dtype)
        layer = LowRankLinear(first.in_features, other.out_features, len(a), device="meta")
        layer.A, layer.B = first, other
        return layer
