"""Minimax: the smallest error that no target has to exceed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slimrank.budget.curves import Curve, Integers
from slimrank.budget.hulls import Table


def least_maximum(curves: Sequence[Curve], budget: int) -> Integers:
    """Choose the candidates whose largest error is least, within the budget.

    Every curve takes its cheapest candidate with an error of at most theta, or the cheapest of its least error where
    none has (its ranks are bounded); theta is the least of all errors for which that fits. What is left goes to the
    target of the largest error that can still grow, again and again.
    """
    order = by_path(curves)
    table = Table.of([curves[i] for i in order])
    thresholds = np.unique(np.concatenate([c.errors for c in curves]))
    low, high = 0, len(thresholds) - 1  # the largest threshold lets everything be cheapest
    while low < high:
        middle = (low + high) // 2
        if table.total(_within(table, thresholds[middle]))[0] <= budget:
            high = middle
        else:
            low = middle + 1
    picks = _within(table, thresholds[high])
    return grow_worst(table, picks, budget)[np.argsort(order)]


def by_path(curves: Sequence[Curve]) -> list[int]:
    """Return the order of the paths, in which ties are broken: that of the curves does not matter."""
    return sorted(range(len(curves)), key=lambda i: curves[i].path)


def grow_worst(table: Table, picks: Integers, budget: int) -> Integers:
    """Let the target of the largest error grow by a candidate, as long as anything fits. In place, and given back."""
    rows = np.arange(len(picks))
    left = budget - table.total(picks)[0]
    while True:
        after = np.minimum(picks + 1, table.lengths - 1)
        steps = table.costs[rows, after] - table.costs[rows, picks]
        fits = (steps > 0) & (steps <= left)
        if not fits.any():
            return picks
        worst = int(np.argmax(np.where(fits, table.errors[rows, picks], -1)))
        left -= int(steps[worst])
        picks[worst] += 1


def _within(table: Table, theta: float) -> Integers:
    """Return the cheapest candidate of each row with an error of at most theta, or of the row's least error."""
    return np.argmax(table.errors <= np.maximum(theta, table.errors.min(axis=1))[:, None], axis=1)
