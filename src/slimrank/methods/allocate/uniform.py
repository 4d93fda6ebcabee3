"""Uniform allocation: every target keeps the same fraction of its parameters."""

from __future__ import annotations

import numpy as np

from slimrank.budget.curves import Floats
from slimrank.budget.problem import Allocation, Problem
from slimrank.budget.proportional import ROUNDING_UNITS, bounds, floors, project, ranks_of
from slimrank.errors import BudgetError
from slimrank.methods.allocator import allocator


@allocator(
    id="uniform",
    title="Uniform: every target keeps the same fraction of its parameters",
    paper="the baseline of all papers",
)
def uniform(problem: Problem) -> Allocation:
    """Take the largest ranks with cost(rank) <= fraction * cost(dense), per target; dense if that fits.

    Equal shapes get equal ranks. The slack is below one step of every single target. It is not spent, since
    that would break the equality. Targets with bounded ranks stay within their bounds, and the others share the rest.

    Raises:
        BudgetError: a target cannot reach even the smallest rank within its share.
    """
    low, high = bounds(problem)
    bounded = np.array([item.limits.dense or item.limits.least > 1 for item in problem.items])
    least = np.where(bounded, low, 0)
    if bounded.all():
        problem.check()
    else:
        _check(problem, np.where(bounded, 0, low), least, high)
    zeros, sliver = np.zeros(len(low)), ROUNDING_UNITS * problem.unit
    fractions = project(zeros, problem.sizes, least, high, problem.budget, sliver)
    return Allocation(ranks_of(problem, floors(problem, fractions * problem.sizes)))


def _check(problem: Problem, wanted: Floats, least: Floats, high: Floats) -> None:
    """Make sure that the largest fraction that a smallest rank takes can be that of all."""
    enough = int(np.ceil((np.clip(wanted.max(), least, high) * problem.sizes).sum()))
    if enough <= problem.budget:
        return
    index = int(np.argmax(wanted))
    item, (ranks, costs) = problem.items[index], problem.choices[index]
    smaller = ", a smaller rank_multiple" if problem.multiple > 1 else ""
    raise BudgetError(
        f"'{item.path}' ({item.shape[0]} x {item.shape[1]}) takes {problem.counted(costs[0]):,} {problem.noun} at "
        f"its smallest rank ({int(ranks[0]) if ranks[0] > 0 else 'dense'}); all layers at that fraction take "
        f"{problem.counted(enough):,}, the budget is {problem.counted(problem.budget):,}.",
        f"{problem.needed(enough)}{smaller}, or an allocation that need not treat all layers alike",
    )
