"""Plans proven best, by mixed-integer programming (HiGHS, through scipy)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from slimrank.budget.curves import Curve, Floats
from slimrank.budget.hulls import Table, hull_steps
from slimrank.budget.knapsack import Solution, fill, planned, possible, relaxed, solve

MAX_SECONDS = 120.0
GAP_TOLERANCE = 1e-9  # relative gap at which HiGHS stops


def solve_exactly(curves: Sequence[Curve], budget: int, seconds: float = MAX_SECONDS) -> Solution:
    """Solve as `knapsack.solve`, to the optimum, or as near to it as so many seconds allow (see the gap).

    Candidates that no optimum can hold, by their reduced cost in the relaxation, are left out beforehand. What the best
    plan has no use for is still spent, as far as a target can grow by it.

    Raises:
        BudgetError: the smallest candidates store more than the budget.
    """
    ordered = sorted(curves, key=lambda curve: curve.path)
    known = solve(ordered, budget)
    table = Table.of(ordered)
    steps = hull_steps(table)
    count, bound = relaxed(table, steps, budget)
    core = possible(ordered, bound, known.error, steps.price(count))
    costs = np.concatenate([c.costs for c in core])
    errors = np.concatenate([c.errors for c in core])
    scale = float(errors.max()) or 1.0
    within = LinearConstraint(csr_array(costs[None, :] / max(budget, 1)), -np.inf, budget / max(budget, 1))
    found = milp(
        errors / scale,
        integrality=np.ones(len(errors)),
        bounds=Bounds(0, 1),
        constraints=[one_each(core), within],
        options={"time_limit": seconds, "mip_rel_gap": GAP_TOLERANCE},
    )
    if found.x is None:
        return known
    solution = solution_of(core, found.x, float(found.mip_dual_bound) * scale)
    if known.error < solution.error or solution.cost > budget:
        return known
    picks = np.array([curve.index(solution.ranks[curve.path]) for curve in ordered])
    fill(table, picks, budget)
    return planned(ordered, picks, solution.bound)


def one_each(curves: Sequence[Curve]) -> LinearConstraint:
    """Require one candidate of every curve; the variables are all candidates in a row."""
    lengths = [len(c) for c in curves]
    count = sum(lengths)
    matrix = csr_array((np.ones(count), np.arange(count), np.append(0, np.cumsum(lengths))), shape=(len(curves), count))
    return LinearConstraint(matrix, 1, 1)


def solution_of(curves: Sequence[Curve], x: Floats, bound: float) -> Solution:
    """Return the plan that a solver's variables say."""
    ends = np.cumsum([len(c) for c in curves])
    picks = np.array([int(np.argmax(part)) for part in np.split(x, ends[:-1])])
    return planned(curves, picks, bound)
