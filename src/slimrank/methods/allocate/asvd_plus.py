"""ASVD's threshold search on LEMS' curves."""

from __future__ import annotations

from collections.abc import Sequence

from slimrank.budget.curves import Curve
from slimrank.budget.measured_curves import anchored_curves
from slimrank.budget.minimax import least_maximum
from slimrank.budget.problem import Allocation, Problem
from slimrank.budget.proportional import ranks_of
from slimrank.methods.allocate.lems import Alpha, Anchors, Gamma, Search, biased, measuring_passes
from slimrank.methods.allocator import allocator


@allocator(
    id="asvd_plus",
    title="The least divergence that no target alone exceeds, by LEMS' curves",
    paper="ASVD+ of the LEMS reference code",
    needs=["spectra", "divergence"],
    passes=measuring_passes,
)
def asvd_plus(
    problem: Problem, *, anchors: Anchors = (0.1,), alpha: Alpha = 0.0, gamma: Gamma = 0.0, search: Search = False
) -> Allocation:
    """Minimise the largest error, by the curves of `lems`."""

    def solve(curves: Sequence[Curve]) -> Allocation:
        return Allocation(ranks_of(problem, least_maximum(*problem.in_units(curves))), tuple(curves))

    return biased(problem, anchored_curves(problem, anchors), alpha, gamma, search, solve)
