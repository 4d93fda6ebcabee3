"""Spend the budget where the spectra say that most error is saved."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from slimrank.allocate.problem import Allocation, Problem
from slimrank.allocate.registry import allocator
from slimrank.allocate.solving import least_error

Scale = Annotated[
    Literal["metric", "relative"],
    Field(description="metric: squared errors as the method measures them; relative: as fractions of a layer's own."),
]


@allocator(
    id="spectrum",
    title="Least sum of squared errors, as the method's own spectra measure them",
    paper="reverse water-filling, over the metric of the decomposition",
    needs=["spectra"],
    solves=True,
)
def spectrum(problem: Problem, *, scale: Scale = "metric", **solving: Any) -> Allocation:
    """Minimise the sum of T_l(r_l), the energy of each spectrum beyond its rank.

    With a metric that looks at gradients (`kfac_svd`, `gfwsvd`) that is already in units of the loss. `relative`
    divides by T_l(0).
    """
    weights = None
    if scale == "relative":
        energies = {item.path: float(problem.tail(item)[0]) for item in problem.items}
        weights = {path: 1 / energy if energy > 0 else 0.0 for path, energy in energies.items()}
    return least_error(problem, problem.curves(weights), solving)
