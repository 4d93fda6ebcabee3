"""Uniform allocation: every target keeps the same fraction of its parameters."""

from __future__ import annotations

import numpy as np

from slimrank.allocate.problem import Allocation, Item, Problem
from slimrank.allocate.registry import allocator
from slimrank.allocate.shares import bounds, floors, project, ranks_of
from slimrank.errors import BudgetError


@allocator(
    id="uniform",
    title="Uniform: every target keeps the same fraction of its parameters",
    paper="the baseline of all papers",
)
def uniform(problem: Problem) -> Allocation:
    """The largest ranks with cost(rank) <= fraction * cost(dense), per target; dense where that fits.

    Equal shapes get equal ranks. The slack is below one step of every target taken alone; it is not handed out,
    since that would break the equality. Targets whose ranks are bounded keep within their bounds, and the others share
    what is left.

    Raises:
        BudgetError: a target cannot reach even the smallest rank within its share.
    """
    low, high = bounds(problem)
    bounded = np.array([item.limits.dense or item.limits.least > 1 for item in problem.items])
    shares = project(np.zeros(len(low)), problem.sizes, np.where(bounded, low, 0), high, problem.budget) * problem.sizes
    picks = floors(problem, shares)
    for item, (ranks, costs), pick, share in zip(problem.items, problem.choices, picks, shares, strict=True):
        if pick < 0:
            raise _too_small(problem, item, int(ranks[0]), int(costs[0]), float(share), low)
    return Allocation(ranks_of(problem, picks))


def _too_small(problem: Problem, item: Item, rank: int, cost: int, share: float, low: np.ndarray) -> BudgetError:
    smaller = ", or a smaller rank_multiple" if problem.multiple > 1 else ""
    return BudgetError(
        f"'{item.path}' ({item.shape[0]} x {item.shape[1]}) may store {share:,.0f} parameters; its smallest rank "
        f"({rank if rank > 0 else 'dense'}) alone takes {cost:,}.",
        f"a keep_ratio of at least {low.max():.4f}{smaller}, or an allocation that need not treat all layers alike",
    )
