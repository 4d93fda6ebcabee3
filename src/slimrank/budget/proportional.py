"""From the fraction that each target is to keep to its rank."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray

from slimrank.budget.curves import Floats, Integers
from slimrank.budget.problem import Problem
from slimrank.budget.ranks import Rank

ROUNDING_UNITS = 1e-4  # of the unit of costs: what rounding may cost or give
BISECTION_STEPS = 200
EQUAL_DIGITS = 12  # digits: fractions that agree so far are equal, and the path decides


def project(
    fractions: Floats, sizes: Floats, low: Floats, high: Floats, total: float, sliver: float = ROUNDING_UNITS
) -> Floats:
    """Shift fractions by a constant and clip them to [low, high], so that they keep `total`.

    Args:
        fractions: of each target, any real numbers.
        sizes: bits of each.
        low: bounds from below; they keep no more than `total`.
        high: bounds from above.
        total: bits to keep; where the upper bounds keep less, those are the result.
        sliver: bits that rounding may cost.
    """

    def at(shift: float) -> Floats:
        return np.clip(fractions + shift, low, high)

    left, right = float((low - fractions).min()), float((high - fractions).max())
    for _ in range(BISECTION_STEPS):
        middle = (left + right) / 2
        if middle in (left, right):
            break
        if float((at(middle) * sizes).sum()) > total:
            right = middle
        else:
            left = middle
    return at(right if float((at(right) * sizes).sum()) <= total + sliver else left)


def bounds(problem: Problem) -> tuple[Floats, Floats]:
    """Return the smallest and the largest fraction that each target can keep."""
    low = np.array([float(costs[0]) for _, costs in problem.choices]) / problem.sizes
    high = np.array([float(costs[-1]) for _, costs in problem.choices]) / problem.sizes
    return low, high


def floors(problem: Problem, shares: Floats) -> Integers:
    """Return the largest candidate within the share of each target, in bits; -1 where none fits."""
    return np.array(
        [
            np.searchsorted(costs, share + ROUNDING_UNITS * problem.unit, side="right") - 1
            for (_, costs), share in zip(problem.choices, shares.tolist(), strict=True)
        ]
    )


def ranks_of(problem: Problem, picks: Sequence[int] | Integers) -> dict[str, Rank]:
    """Return candidates as ranks by path."""
    ranks: dict[str, Rank] = {}
    for item, (candidates, _), pick in zip(problem.items, problem.choices, picks, strict=True):
        rank = int(candidates[pick])
        ranks[item.path] = rank if rank > 0 else "dense"
    return ranks


def ranks_from_fractions(problem: Problem, fractions: Floats) -> dict[str, Rank]:
    """Choose ranks of targets that keep these fractions, up to a shift and their bounds, within the budget.

    What is to keep all of itself stays dense, the largest fractions first, as long as the others can make room for
    it: just below, a pair stores as much and errs. Each of the others is rounded down; what that leaves goes, candidate
    by candidate, to the target that is farthest below its fraction, until no target can grow within it.

    Raises:
        BudgetError: even the smallest ranks store more than the budget.
    """
    problem.check()
    low, high = bounds(problem)
    low = np.where(_whole(problem, fractions, low, high), high, low)
    wanted = project(fractions, problem.sizes, low, high, problem.budget, ROUNDING_UNITS * problem.unit)
    return ranks_of(problem, _grown(problem, wanted, floors(problem, wanted * problem.sizes)))


def _whole(problem: Problem, fractions: Floats, low: Floats, high: Floats) -> NDArray[np.bool_]:
    """Tell which targets are to keep all of themselves and can, besides the smallest ranks of all others."""
    extra = np.rint((high - low) * problem.sizes)
    left = problem.budget - np.rint(low * problem.sizes).sum()
    chosen = np.zeros(len(fractions), dtype=bool)
    for i in sorted(np.flatnonzero(fractions >= 1), key=lambda i: (-fractions[i], problem.items[i].path)):
        chosen[i] = extra[i] <= left
        left -= extra[i] * chosen[i]
    return chosen


def _grown(problem: Problem, wanted: Floats, picks: Integers) -> Integers:
    """Hand out what is left of the budget. In place, and given back."""
    left = problem.budget - sum(int(costs[p]) for (_, costs), p in zip(problem.choices, picks, strict=True))

    def entry(i: int) -> tuple[float, str, int]:
        short = wanted[i] - problem.choices[i][1][picks[i]] / problem.sizes[i]
        return -round(float(short), EQUAL_DIGITS), problem.items[i].path, i

    heap = [entry(i) for i in range(len(picks))]
    heapify(heap)
    while heap:
        _, _, i = heappop(heap)
        costs = problem.choices[i][1]
        step = int(costs[picks[i] + 1] - costs[picks[i]]) if picks[i] + 1 < len(costs) else left + 1
        if step <= left:
            left -= step
            picks[i] += 1
            heappush(heap, entry(i))
    return picks
