"""Plans with side constraints proven best, or as near to the best as the time allows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, milp

from slimrank.budget.constrained import filled, solve_constrained
from slimrank.budget.constraints import Constraints, keeps, reachable_blocks, rows
from slimrank.budget.curves import Curve
from slimrank.budget.exact import GAP_TOLERANCE, MAX_SECONDS, one_each, solution_of
from slimrank.budget.knapsack import Solution


def solve_constrained_exactly(
    curves: Sequence[Curve], budget: int, constraints: Constraints, seconds: float = MAX_SECONDS
) -> Solution:
    """Solve as `constrained.solve_constrained`, over all candidates of all curves at once (HiGHS).

    What the best plan has no use for is spent as there: as far as the budget and the constraints let a target grow.

    Raises:
        BudgetError: no plan meets all constraints.
    """
    known = solve_constrained(curves, budget, constraints)
    blocks = reachable_blocks(curves, budget, constraints)
    ordered = [curve for block in blocks for curve in block.curves]
    errors = np.concatenate([c.errors for c in ordered])
    scale = known.error or 1.0
    whole = np.array([b.whole for b in blocks])
    sides = rows([b.curves for b in blocks], whole, budget, constraints)
    found = milp(
        errors / scale,
        integrality=np.ones(len(errors)),
        bounds=Bounds(0, 1),
        constraints=[one_each(ordered), *sides],
        options={"time_limit": seconds, "mip_rel_gap": GAP_TOLERANCE},
    )
    if found.x is None:
        return known
    best = solution_of(ordered, found.x, max(float(found.mip_dual_bound) * scale, known.bound))
    if best.cost > budget or not keeps(blocks, best.ranks, constraints) or known.error < best.error:
        return known
    picks = np.array([curve.index(best.ranks[curve.path]) for curve in ordered])
    return filled(ordered, picks, whole, budget, constraints, best.bound)
