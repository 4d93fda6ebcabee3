"""Solve for both factors by reduced-rank regression."""

from __future__ import annotations

from torch import Tensor

from slimrank.linalg.regression import Regression, reduced_rank
from slimrank.methods.refiner import COMMON, refiner


@refiner(
    id="regress",
    title="both factors by reduced-rank regression on the compressed model's inputs",
    paper="Izenman, Reduced-rank regression, 1975; AA-SVD, arXiv 2604.02119",
    changes_a=True,
    settings=(*COMMON, "metric"),
)
def regress(problem: Regression, weight: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best W' of this rank for || L^T (T - W' X') ||_F, G = L L^T the form on the outputs.

    Where G is the identity it is never worse than `update`.
    """
    spectrum, best = reduced_rank(problem)
    return spectrum.factors(best, len(A))
