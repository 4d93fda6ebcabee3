"""Both factors anew by reduced-rank regression."""

from __future__ import annotations

from torch import Tensor

from slimrank.linalg.regression import Regression, reduced_rank
from slimrank.refine.registry import refiner


@refiner(
    id="regress",
    title="both factors anew by reduced-rank regression on the compressed model's inputs",
    paper="Izenman, Reduced-rank regression, 1975; AA-SVD, arXiv 2604.02119",
    changes_a=True,
)
def regress(problem: Regression, weight: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The best W' of this rank for || T - W' X' ||_F: never worse than `update`."""
    spectrum, best = reduced_rank(problem)
    return spectrum.factors(best, len(A))
