"""MRCS' greedy steps on LEMS' curves."""

from __future__ import annotations

from collections.abc import Sequence

from slimrank.budget.curves import Curve
from slimrank.budget.measured_curves import anchored_curves
from slimrank.budget.problem import Allocation, Problem
from slimrank.budget.proportional import ranks_of
from slimrank.methods.allocate.lems import Alpha, Anchors, Gamma, Search, biased, measuring_passes
from slimrank.methods.allocate.mrcs import Steps, greedy
from slimrank.methods.allocator import allocator


@allocator(
    id="mrcs_plus",
    title="Greedy steps by a falling quota, each where LEMS' divergence after it is least",
    paper="MRCS+ of the LEMS reference code",
    needs=["spectra", "divergence"],
    passes=measuring_passes,
)
def mrcs_plus(
    problem: Problem,
    *,
    steps: Steps = 80,
    anchors: Anchors = (0.1,),
    alpha: Alpha = 0.0,
    gamma: Gamma = 0.0,
    search: Search = False,
) -> Allocation:
    """Reduce greedily as `mrcs` does, on LEMS' curves."""

    def solve(curves: Sequence[Curve]) -> Allocation:
        return Allocation(ranks_of(problem, greedy(*problem.in_units(curves), steps)), tuple(curves))

    return biased(problem, anchored_curves(problem, anchors), alpha, gamma, search, solve)
