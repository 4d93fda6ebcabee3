"""Plans with side constraints proven best, or as near to it as can be told in time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, milp

from slimrank.allocate.constrained import filled, infeasible, solve_constrained
from slimrank.allocate.constraints import Constraints, keeps, reachable_blocks, rows
from slimrank.allocate.curve import Curve
from slimrank.allocate.exact import SECONDS, TOLERANCE, one_each, solution_of
from slimrank.allocate.knapsack import Solution, check_feasible
from slimrank.errors import BudgetError


def solve_constrained_exactly(
    curves: Sequence[Curve], budget: int, constraints: Constraints, seconds: float = SECONDS
) -> Solution:
    """As `constrained.solve_constrained`, over all candidates of all curves at once (HiGHS).

    What the best plan has no use for is spent as there: as far as the budget and the constraints let a target grow.

    Raises:
        BudgetError: no plan meets all constraints, or none was found in so many seconds.
    """
    check_feasible(curves, budget)
    blocks = reachable_blocks(curves, budget, constraints)
    known = _near(curves, budget, constraints)
    ordered = [curve for block in blocks for curve in block.curves]
    errors = np.concatenate([c.errors for c in ordered])
    scale = (known.error if known else float(errors.max())) or 1.0
    whole = np.array([b.whole for b in blocks])
    sides = rows([b.curves for b in blocks], whole, budget, constraints)
    found = milp(
        errors / scale,
        integrality=np.ones(len(errors)),
        bounds=Bounds(0, 1),
        constraints=[one_each(ordered), *sides],
        options={"time_limit": seconds, "mip_rel_gap": TOLERANCE},
    )
    if found.x is not None:
        best = solution_of(ordered, found.x, max(float(found.mip_dual_bound) * scale, known.bound if known else 0.0))
        if best.cost <= budget and keeps(blocks, best.ranks, constraints) and not (known and known.error < best.error):
            picks = np.array([curve.index(best.ranks[curve.path]) for curve in ordered])
            return filled(ordered, picks, whole, budget, constraints, best.bound)
    if known is None:
        raise infeasible(constraints)
    return known


def _near(curves: Sequence[Curve], budget: int, constraints: Constraints) -> Solution | None:
    """The plan of the sizes that are tried, or none: these may miss the only ones that go together."""
    try:
        return solve_constrained(curves, budget, constraints)
    except BudgetError:
        return None
