"""Spend the budget where it saves most error according to the spectra."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from slimrank.budget.curves import Curve
from slimrank.budget.problem import Allocation, Problem
from slimrank.methods.allocator import allocator
from slimrank.methods.solver_options import least_error

Scale = Annotated[
    Literal["auto", "metric", "relative"],
    Field(
        description="metric: squared errors as the method measures them; relative: as fractions of a layer's own; "
        "auto: metric for methods that look at gradients, whose errors are in units of the loss, else relative."
    ),
]


@allocator(
    id="spectrum",
    title="Least sum of squared errors, as the method's own spectra measure them",
    paper="reverse water-filling, over the metric of the decomposition",
    needs=["spectra"],
    solves=True,
    joint=True,
)
def spectrum(problem: Problem, *, scale: Scale = "auto", **solving: Any) -> Allocation:
    """Minimise the sum of T_l(r_l), the energy of each spectrum beyond its rank, or of T_l(r_l) / T_l(0)."""
    return least_error(problem, spectral_curves(problem, scale), solving)


def spectral_curves(problem: Problem, scale: str = "auto") -> list[Curve]:
    """Return T_l(r), divided by T_l(0) if the scale is relative, or auto and spectra are not in units of the loss."""
    if scale == "metric" or (scale == "auto" and problem.in_loss):
        return problem.curves()
    energies = {item.path: float(problem.tail(item)[0]) for item in problem.items}
    return problem.curves({path: 1 / energy if energy > 0 else 0.0 for path, energy in energies.items()})
