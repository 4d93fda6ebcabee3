"""Dense weights of few bits, with a low-rank pair that makes up for their rounding."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from slimrank.layers.quantized_forms import Part, QuantizedForm, Rank, rounded_part
from slimrank.layers.residual import ResidualLinear
from slimrank.linalg.gptq import gptq
from slimrank.linalg.lowrank import solve
from slimrank.linalg.regression import Regression, best_b

RANKS = (8, 16, 32)  # that a budget solver may choose
ROUNDS = 2  # of rounding what the pair leaves, and of solving for the pair


class QuantizedResidual(QuantizedForm):
    """W ~ Q + B A: Q rounded with regard to the inputs, B A the best pair of its rank for W - Q.

    Both in turn, as in CALDERA (arXiv 2405.18886); the pair by the closed form of QERA (arXiv 2410.06040).
    """

    base: ClassVar[str] = "residual"

    @classmethod
    def choices(cls, m: int, n: int, group: int | None) -> list[tuple[str, Rank]]:
        """See `QuantizedForm.choices`: corrections of few ranks in 8 bits."""
        return [("residual:{}/int8", rank) for rank in RANKS if rank < min(m, n)]

    def parts(self, m: int, n: int, rank: int) -> list[Part]:
        """See `QuantizedForm.parts`."""
        return [
            Part("base", m, n, self.first),
            Part("A", rank, n, self.other),
            Part("B", m, rank, self.other),
        ]

    def unrounded(self, m: int, n: int, rank: int, dtype: torch.dtype) -> ResidualLinear:
        """See `QuantizedForm.unrounded`."""
        return ResidualLinear(n, m, rank, dtype=dtype)

    def fit(self, problem: Regression, start: nn.Module, rank: int, dtype: torch.dtype) -> ResidualLinear:
        """See `QuantizedForm.fit`."""
        best, gram = problem.solution(), problem.gram
        pair = torch.zeros_like(best)
        for _ in range(ROUNDS):
            a, b = _pair(problem, best - gptq(best - pair, gram, self.first, dtype, sweeps=0).values(), rank)
            pair = b @ a
        base, q = rounded_part(best - pair, gram, self.first, dtype)
        a, _ = _pair(problem, best - q, rank)
        first, a = rounded_part(a, gram, self.other, dtype)
        left = Regression(gram, (best - q) @ gram)
        other, _ = rounded_part(best_b(left, a), a @ gram @ a.t(), self.other, dtype)
        return ResidualLinear.from_parts(base, first, other)


def _pair(problem: Regression, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A and B of the best pair for a weight, in the metric of the problem's inputs."""
    return solve(weight, Regression(problem.gram, weight).metric(), rank=rank).factors(weight, rank)
