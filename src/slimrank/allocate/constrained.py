"""Plans that keep side constraints by decoder block, besides the budget.

Each block is solved at a number of sizes; HiGHS chooses one size for each block; what that leaves of the budget is
filled. The bound is that of the linear relaxation with all candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array, vstack

from slimrank.allocate.curve import Curve, Integers
from slimrank.allocate.exact import one_each
from slimrank.allocate.hull import Table, hull_steps
from slimrank.allocate.knapsack import Solution, check_feasible, fill, solve
from slimrank.errors import BudgetError

LEVELS = 48  # sizes at which a block is solved
SECONDS = 20.0
NEAR = 1e-3  # relative gap at which the search among sizes stops


@dataclass(frozen=True)
class Constraints:
    """What a plan must keep.

    Attributes:
        blocks: path -> decoder block.
        whole: path -> parameters of the dense weight.
        monotone: a block keeps no larger a fraction of its parameters than the one before.
        floor: least fraction that a block keeps.
        cap: largest fraction that a block keeps.
    """

    blocks: Mapping[str, int]
    whole: Mapping[str, int]
    monotone: bool = False
    floor: float = 0.0
    cap: float = 1.0

    @property
    def any(self) -> bool:
        """Whether it constrains anything."""
        return self.monotone or self.floor > 0 or self.cap < 1


def solve_constrained(
    curves: Sequence[Curve], budget: int, constraints: Constraints, seconds: float = SECONDS
) -> Solution:
    """Ranks of little total error within the budget that keep side constraints; the gap says how little.

    Raises:
        BudgetError: no plan meets all constraints, or none was found in so many seconds.
    """
    ordered = sorted(curves, key=lambda curve: (constraints.blocks[curve.path], curve.path))
    check_feasible(ordered, budget)
    numbers = sorted({constraints.blocks[curve.path] for curve in ordered})
    members = [[c for c in ordered if constraints.blocks[c.path] == b] for b in numbers]
    whole = np.array([sum(constraints.whole[c.path] for c in part) for part in members])
    bound = _bound(members, whole, budget, constraints)
    plans = [_plans(part, int(w), constraints) for part, w in zip(members, whole, strict=True)]
    picks = _choose(plans, whole, budget, constraints, seconds)
    ranks = {path: rank for plan, pick in zip(plans, picks, strict=True) for path, rank in plan[pick].ranks.items()}
    return _filled(ordered, np.array([c.index(ranks[c.path]) for c in ordered]), whole, budget, constraints, bound)


def _plans(curves: Sequence[Curve], whole: int, constraints: Constraints) -> list[Solution]:
    """Plans of a block at a number of sizes between floor and cap, smallest first, none worse than a smaller one."""
    least, most = sum(int(c.costs[0]) for c in curves), sum(int(c.costs[-1]) for c in curves)
    low = max(least, int(np.ceil(constraints.floor * whole)))
    high = min(most, int(constraints.cap * whole))
    plans: list[Solution] = []
    for size in np.unique(np.linspace(low, max(low, high), LEVELS).astype(np.int64)):
        plan = solve(curves, int(size)) if low <= high else None
        if plan and plan.cost >= constraints.floor * whole and (not plans or plan.cost > plans[-1].cost):
            plans.append(plan)
    if not plans:
        raise _infeasible(constraints)
    return plans


def _choose(
    plans: Sequence[Sequence[Solution]], whole: Integers, budget: int, constraints: Constraints, seconds: float
) -> list[int]:
    """One plan for each block."""
    blocks = [
        Curve(
            f"block {b}",
            np.arange(len(part)),
            np.array([plan.cost for plan in part]),
            np.minimum.accumulate([plan.error for plan in part]),
        )
        for b, part in enumerate(plans)
    ]
    errors = np.concatenate([b.errors for b in blocks])
    found = milp(
        errors / (errors.max() or 1.0),
        integrality=np.ones(len(errors)),
        bounds=Bounds(0, 1),
        constraints=[one_each(blocks), *_rows([[b] for b in blocks], whole, budget, constraints)],
        options={"time_limit": seconds, "mip_rel_gap": NEAR},
    )
    if found.x is None:
        raise _infeasible(constraints)
    return [int(np.argmax(part)) for part in np.split(found.x, np.cumsum([len(b) for b in blocks])[:-1])]


def _rows(
    members: Sequence[Sequence[Curve]], whole: Integers, budget: int, constraints: Constraints
) -> list[LinearConstraint]:
    """Budget, floor, cap and order, over all candidates of all curves of all blocks in a row."""
    costs = [np.concatenate([c.costs for c in part]) for part in members]
    starts = np.append(0, np.cumsum([len(c) for c in costs]))
    kept = csr_array(
        (np.concatenate([c / w for c, w in zip(costs, whole, strict=True)]), np.arange(starts[-1]), starts),
        shape=(len(members), int(starts[-1])),
    )
    rows = [
        LinearConstraint(csr_array(np.concatenate(costs)[None, :] / max(1, budget)), -np.inf, budget / max(1, budget))
    ]
    rows.append(LinearConstraint(kept, constraints.floor, constraints.cap))
    if constraints.monotone and len(members) > 1:
        rows.append(LinearConstraint(csr_array(kept[:-1] - kept[1:]), 0, np.inf))
    return rows


def _bound(members: Sequence[Sequence[Curve]], whole: Integers, budget: int, constraints: Constraints) -> float:
    """Optimum of the linear relaxation: no plan that keeps the constraints has less error.

    Since they only look at costs, the candidates on the lower hulls are enough.
    """
    hulls = [[_on_hull(curve) for curve in part] for part in members]
    flat = [curve for part in hulls for curve in part]
    errors = np.concatenate([c.errors for c in flat])
    scale = float(errors.max()) or 1.0
    one, sides = one_each(flat), []
    for row in _rows(hulls, whole, budget, constraints):
        sides += [(row.A, row.ub)] if np.isfinite(row.ub).all() else []
        sides += [(-row.A, -row.lb)] if np.isfinite(row.lb).all() else []
    ends = np.concatenate([np.broadcast_to(end, matrix.shape[:1]) for matrix, end in sides])
    found = linprog(
        errors / scale, vstack([m for m, _ in sides]), ends, one.A, np.ones(len(flat)), bounds=(0, None), method="highs"
    )  # fmt: skip
    if found.x is None:
        raise _infeasible(constraints)
    return max(0.0, float(found.fun) * scale)


def _on_hull(curve: Curve) -> Curve:
    steps = hull_steps(Table.of([curve]))
    kept = np.zeros(len(curve), dtype=bool)
    kept[steps.start] = True
    kept[steps.pick] = True
    return curve.choose(kept)


def _filled(
    curves: Sequence[Curve], picks: Integers, whole: Integers, budget: int, constraints: Constraints, bound: float
) -> Solution:
    """Spend what is left, as far as the constraints let it be spent."""
    table = Table.of(curves)
    _, block = np.unique([constraints.blocks[c.path] for c in curves], return_inverse=True)

    def room(chosen: Integers) -> Integers:
        kept = np.bincount(block, table.costs[np.arange(len(chosen)), chosen])
        most = np.full(len(whole), constraints.cap)
        if constraints.monotone:
            most[1:] = np.minimum(most[1:], (kept / whole)[:-1])
        return np.floor(most * whole * (1 + 1e-12) - kept).astype(np.int64)[block]

    fill(table, picks, budget, room)
    cost, error = table.total(picks)
    ranks = {curve.path: curve.rank(int(pick)) for curve, pick in zip(curves, picks, strict=True)}
    return Solution(ranks, cost, error, min(bound, error))


def _infeasible(constraints: Constraints) -> BudgetError:
    depth = ", falling with depth" if constraints.monotone else ""
    return BudgetError(
        f"no plan within the budget was found that keeps {constraints.floor:g} to {constraints.cap:g} of every "
        f"block{depth}.",
        "a lower block_floor, a higher block_cap, or a larger budget",
    )
