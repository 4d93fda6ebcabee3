"""Greedy: in each step, reduce the target that loses least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from slimrank.budget.curves import Curve, Integers
from slimrank.budget.hulls import Table
from slimrank.budget.minimax import by_path, grow_worst
from slimrank.budget.problem import Allocation, Problem
from slimrank.budget.proportional import ranks_of
from slimrank.methods.allocator import allocator

Steps = Annotated[int, Field(ge=1, description="Steps in which the excess over the budget falls to about a third.")]


@allocator(
    id="mrcs",
    title="Greedy steps by a falling quota, each where the relative error after it is least",
    paper="MRCS, arXiv 2402.06004",
    needs=["spectra"],
)
def mrcs(problem: Problem, *, steps: Steps = 80) -> Allocation:
    """Reduce greedily by errors T_1(r) / T_1(0), the singular values beyond the rank as a fraction of their sum."""
    weights = {item.path: 1 / max(float(problem.tail(item, 1)[0]), 1e-300) for item in problem.items}
    curves = problem.curves(weights, power=1)
    return Allocation(ranks_of(problem, greedy(*problem.in_units(curves), steps)), tuple(curves))


def greedy(curves: Sequence[Curve], budget: int, steps: int) -> Integers:
    """Return the candidates after scheduled greedy steps.

    Step t removes q_t parameters or a few more, q_t = excess * (exp(-(t-1)/steps) - exp(-t/steps)), from the target
    whose error is least after it. With more and more steps this approaches `minimax.least_maximum`. If the last step
    removes too much, the rest goes back to the targets of largest error.
    """
    order = by_path(curves)
    table = Table.of([curves[i] for i in order])
    rows = np.arange(len(curves))
    picks = table.lengths - 1
    cost = table.total(picks)[0]
    excess = max(0, cost - budget)
    cut = 0
    while cost > budget:
        quota = max(1.0, excess * (np.exp(-cut / steps) - np.exp(-(cut + 1) / steps)))
        now = table.costs[rows, picks]
        after = np.maximum((table.costs <= (now - quota)[:, None]).sum(axis=1) - 1, 0)
        errors = np.where(after < picks, table.errors[rows, after], np.inf)
        best = int(np.argmin(errors))
        cost -= int(now[best] - table.costs[best, after[best]])
        picks[best] = after[best]
        cut += 1
    return grow_worst(table, picks, budget)[np.argsort(order)]
