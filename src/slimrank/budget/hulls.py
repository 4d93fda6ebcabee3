"""Lower convex hulls of many curves at once, and the path of plans along them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slimrank.budget.curves import Curve, Floats, Integers

ABSENT_COST = np.int64(2**62)  # cost of a candidate that is none


@dataclass(frozen=True)
class Table:
    """All candidates of all curves: rows are curves, columns their candidates, cheapest first.

    Attributes:
        costs: int64, `ABSENT_COST` beyond the end of a row.
        errors: float64, infinite beyond the end of a row.
        lengths: candidates of each row.
    """

    costs: Integers
    errors: Floats
    lengths: Integers

    @classmethod
    def of(cls, curves: Sequence[Curve]) -> Table:
        """Return the table of some curves."""
        lengths = np.array([len(c) for c in curves], dtype=np.int64)
        costs = np.full((len(curves), int(lengths.max())), ABSENT_COST)
        errors = np.full(costs.shape, np.inf)
        for row, curve in enumerate(curves):
            costs[row, : len(curve)] = curve.costs
            errors[row, : len(curve)] = curve.errors
        return cls(costs, errors, lengths)

    def total(self, picks: Integers) -> tuple[int, float]:
        """Return the cost and the error of one candidate for each row."""
        rows = np.arange(len(picks))
        return int(self.costs[rows, picks].sum()), float(self.errors[rows, picks].sum())


@dataclass(frozen=True)
class Steps:
    """All steps along the lower hulls, those that gain most per parameter first.

    Beginning at the cheapest candidates and taking steps in order gives, after each, the plan of least error for its
    cost (Everett 1963), and between two of them the optimum of the linear relaxation.

    Attributes:
        start: the candidate of least error among the cheapest of each row.
        row: which row each step belongs to.
        pick: the candidate that it leads to.
        cost: parameters it takes, > 0.
        gain: error it saves, > 0.
    """

    start: Integers
    row: Integers
    pick: Integers
    cost: Integers
    gain: Floats

    def price(self, count: int) -> float:
        """Return the error that one more parameter saves after `count` steps: the multiplier of the budget."""
        return float(self.gain[count] / self.cost[count]) if count < len(self.cost) else 0.0

    def picks(self, count: int) -> Integers:
        """Return the plan after the first `count` steps."""
        chosen = self.start.copy()
        np.maximum.at(chosen, self.row[:count], self.pick[:count])
        return chosen


def hull_steps(table: Table) -> Steps:
    """Return the steps of all rows."""
    stack, sizes = _hulls(table)
    rows, places = np.nonzero(np.arange(stack.shape[1] - 1)[None, :] < (sizes - 1)[:, None])
    before, after = stack[rows, places], stack[rows, places + 1]
    cost = table.costs[rows, after] - table.costs[rows, before]
    gain = table.errors[rows, before] - table.errors[rows, after]
    order = np.argsort(-gain / cost, kind="stable")
    return Steps(stack[:, 0].copy(), rows[order], after[order], cost[order], gain[order])


def _hulls(table: Table) -> tuple[Integers, Integers]:
    """Find the candidates on the lower hull of every row, and count them: Andrew's monotone chain, all rows in step."""
    costs, errors = table.costs.astype(np.float64), table.errors
    count = len(table.lengths)
    stack = np.zeros(costs.shape, dtype=np.int64)
    sizes, heads = np.ones(count, dtype=np.int64), np.ones(count, dtype=np.int64)
    active = np.flatnonzero(heads < table.lengths)
    while len(active):
        size, head = sizes[active], heads[active]
        top = stack[active, size - 1]
        under = stack[active, np.maximum(size - 2, 0)]
        over_chord = (errors[active, top] - errors[active, under]) * (costs[active, head] - costs[active, under]) >= (
            errors[active, head] - errors[active, under]
        ) * (costs[active, top] - costs[active, under])
        pop = (size > 1) & over_chord
        skip = ~pop & (errors[active, head] >= errors[active, top])
        push = ~pop & ~skip
        sizes[active[pop]] -= 1
        stack[active[push], size[push]] = head[push]
        sizes[active[push]] += 1
        heads[active[push | skip]] += 1
        active = active[heads[active] < table.lengths[active]]
    return stack, sizes
