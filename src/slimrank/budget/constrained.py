"""Plans that keep side constraints by decoder block, besides the budget.

Each block is solved at a number of sizes; HiGHS chooses one size for each block; what that leaves of the budget is
filled. The bound is that of the linear relaxation with all candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, linprog, milp
from scipy.sparse import vstack

from slimrank.budget.constraints import Block, Constraints, keeps, reachable_blocks, rows, smallest_plan
from slimrank.budget.curves import Curve, Integers
from slimrank.budget.exact import one_each
from slimrank.budget.hulls import Table, hull_steps
from slimrank.budget.knapsack import Solution, check_feasible, fill, planned, solve

BLOCK_SIZES = 48  # sizes at which a block is solved
MAX_SECONDS = 20.0
NEAR_GAP = 1e-3  # relative gap at which the search among sizes stops


def solve_constrained(
    curves: Sequence[Curve], budget: int, constraints: Constraints, seconds: float = MAX_SECONDS
) -> Solution:
    """Choose ranks of little total error within the budget and the side constraints; the gap bounds that error.

    The smallest plan that keeps them is among those that are looked at, so that one is found if there is any.

    Raises:
        BudgetError: no plan meets all constraints.
    """
    check_feasible(curves, budget)
    blocks = reachable_blocks(curves, budget, constraints)
    smallest = smallest_plan(blocks, constraints)
    assert smallest is not None
    bound = _bound(blocks, budget, constraints)
    plans = [_plans(block, picks, constraints) for block, picks in zip(blocks, smallest, strict=True)]
    whole = np.array([block.whole for block in blocks])
    picks = _choose(plans, whole, budget, constraints, seconds)
    chosen = [plan[pick] for plan, pick in zip(plans, picks, strict=True)]
    ranks = {path: rank for plan in chosen for path, rank in plan.ranks.items()}
    if sum(plan.cost for plan in chosen) > budget or not keeps(blocks, ranks, constraints):
        ranks = {path: rank for plan in plans for path, rank in plan[0].ranks.items()}
    ordered = [curve for block in blocks for curve in block.curves]
    return filled(ordered, np.array([c.index(ranks[c.path]) for c in ordered]), whole, budget, constraints, bound)


def _plans(block: Block, smallest: Integers, constraints: Constraints) -> list[Solution]:
    """Make plans of a block at a number of sizes, from the smallest allowed to the cap."""
    first = planned(block.curves, smallest, 0.0)
    found = {first.cost: first}
    high = min(sum(int(c.costs[-1]) for c in block.curves), int(constraints.cap * block.whole))
    for size in np.unique(np.linspace(first.cost, max(first.cost, high), BLOCK_SIZES).astype(np.int64)):
        plan = solve(block.curves, int(size))
        if plan.cost >= first.cost and plan.error <= found.get(plan.cost, plan).error:
            found[plan.cost] = plan
    return [found[cost] for cost in sorted(found)]


def _choose(
    plans: Sequence[Sequence[Solution]], whole: Integers, budget: int, constraints: Constraints, seconds: float
) -> list[int]:
    """Return one plan for each block: the smallest of each where the solver, in so many seconds, finds none."""
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
        constraints=[one_each(blocks), *rows([[b] for b in blocks], whole, budget, constraints)],
        options={"time_limit": seconds, "mip_rel_gap": NEAR_GAP},
    )
    if found.x is None:
        return [0] * len(blocks)
    return [int(np.argmax(part)) for part in np.split(found.x, np.cumsum([len(b) for b in blocks])[:-1])]


def _bound(blocks: Sequence[Block], budget: int, constraints: Constraints) -> float:
    """Return the optimum of the linear relaxation: no plan that keeps the constraints has less error.

    Since they only look at costs, the candidates on the lower hulls are enough, and the largest, which a floor may need
    although it saves nothing.
    """
    hulls = [[_on_hull(curve) for curve in block.curves] for block in blocks]
    whole = np.array([block.whole for block in blocks])
    flat = [curve for part in hulls for curve in part]
    errors = np.concatenate([c.errors for c in flat])
    scale = float(errors.max()) or 1.0
    one, sides = one_each(flat), []
    for row in rows(hulls, whole, budget, constraints):
        sides += [(row.A, row.ub)] if np.isfinite(row.ub).all() else []
        sides += [(-row.A, -row.lb)] if np.isfinite(row.lb).all() else []
    ends = np.concatenate([np.broadcast_to(end, matrix.shape[:1]) for matrix, end in sides])
    found = linprog(
        errors / scale, vstack([m for m, _ in sides]), ends, one.A, np.ones(len(flat)), bounds=(0, None), method="highs"
    )  # fmt: skip
    return max(0.0, float(found.fun) * scale) if found.x is not None else 0.0


def _on_hull(curve: Curve) -> Curve:
    steps = hull_steps(Table.of([curve]))
    kept = np.zeros(len(curve), dtype=bool)
    kept[steps.start] = True
    kept[steps.pick] = True
    kept[-1] = True
    return curve.choose(kept)


def filled(
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
    return planned(curves, picks, bound)
