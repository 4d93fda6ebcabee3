"""Solve for B again, with A unchanged."""

from __future__ import annotations

from torch import Tensor

from slimrank.linalg.regression import Regression, best_b
from slimrank.methods.refiner import refiner


@refiner(
    id="update",
    title="B by least squares on the compressed model's inputs",
    paper="Wang et al., SVD-LLM, arXiv 2403.07378 (update of one factor)",
    changes_a=False,
)
def update(problem: Regression, weight: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return B = T Z^T (Z Z^T)^+ with Z = A X'."""
    return A, best_b(problem, A)
