"""AdaSVD's adaComp: B and A in turn."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from slimrank.linalg.regression import Regression, alternate
from slimrank.methods.refiner import COMMON, refiner

Iterations = Annotated[int, Field(ge=1, description="Rounds of B, then A.")]


@refiner(
    id="ada_comp",
    title="B and A in turn, each by least squares",
    paper="Li et al., AdaSVD, arXiv 2502.01403 (adaComp)",
    changes_a=True,
    settings=(*COMMON, "stack_of_batch"),
)
def ada_comp(
    problem: Regression, weight: Tensor, A: Tensor, B: Tensor, *, iterations: Iterations = 1
) -> tuple[Tensor, Tensor]:
    """Run rounds of B and A in turn; each is one step of subspace iteration towards `regress`."""
    return alternate(problem, A, iterations)
