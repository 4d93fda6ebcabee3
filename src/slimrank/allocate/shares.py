"""From the fraction that each target is to keep to its rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slimrank.allocate.curve import Floats, Integers
from slimrank.allocate.problem import Problem
from slimrank.linalg.cost import Rank

SLIVER = 1e-4  # parameters that rounding may cost or give
BISECTIONS = 200


def project(fractions: Floats, sizes: Floats, low: Floats, high: Floats, total: float) -> Floats:
    """Fractions shifted by a constant and clipped to [low, high] so that they keep `total` parameters.

    Args:
        fractions: of each target, any real numbers.
        sizes: parameters of each.
        low: bounds from below; they keep no more than `total`.
        high: bounds from above.
        total: parameters to keep; where the upper bounds keep less, those are the answer.
    """

    def at(shift: float) -> Floats:
        return np.clip(fractions + shift, low, high)

    left, right = float((low - fractions).min()), float((high - fractions).max())
    for _ in range(BISECTIONS):
        middle = (left + right) / 2
        if middle in (left, right):
            break
        if float((at(middle) * sizes).sum()) > total:
            right = middle
        else:
            left = middle
    return at(right if float((at(right) * sizes).sum()) <= total + SLIVER else left)


def bounds(problem: Problem) -> tuple[Floats, Floats]:
    """Smallest and largest fraction that each target can keep."""
    low = np.array([float(costs[0]) for _, costs in problem.choices]) / problem.sizes
    high = np.array([float(costs[-1]) for _, costs in problem.choices]) / problem.sizes
    return low, high


def floors(problem: Problem, shares: Floats) -> Integers:
    """The largest candidate within the share of each target, in parameters; -1 where none fits."""
    return np.array(
        [
            np.searchsorted(costs, share + SLIVER, side="right") - 1
            for (_, costs), share in zip(problem.choices, shares.tolist(), strict=True)
        ]
    )


def ranks_of(problem: Problem, picks: Sequence[int] | Integers) -> dict[str, Rank]:
    """Candidates as ranks by path."""
    ranks: dict[str, Rank] = {}
    for item, (candidates, _), pick in zip(problem.items, problem.choices, picks, strict=True):
        rank = int(candidates[pick])
        ranks[item.path] = rank if rank > 0 else "dense"
    return ranks


def ranks_from_fractions(problem: Problem, fractions: Floats) -> dict[str, Rank]:
    """Ranks of targets that are to keep these fractions, up to a shift and their bounds, within the budget.

    Each is rounded down; what that leaves goes, candidate by candidate, to the target that is farthest below its
    fraction, until no target can grow within it.

    Raises:
        BudgetError: even the smallest ranks store more than the budget.
    """
    problem.check()
    wanted = project(fractions, problem.sizes, *bounds(problem), problem.budget)
    picks = floors(problem, wanted * problem.sizes)
    left = problem.budget - sum(int(costs[p]) for (_, costs), p in zip(problem.choices, picks, strict=True))
    order = sorted(range(len(picks)), key=lambda i: problem.items[i].path)
    while True:
        best, worth = None, -np.inf
        for i in order:
            costs = problem.choices[i][1]
            if picks[i] + 1 < len(costs) and costs[picks[i] + 1] - costs[picks[i]] <= left:
                short = wanted[i] - costs[picks[i]] / problem.sizes[i]
                if short > worth + 1e-15:
                    best, worth = i, short
        if best is None:
            return ranks_of(problem, picks)
        costs = problem.choices[best][1]
        left -= int(costs[picks[best] + 1] - costs[picks[best]])
        picks[best] += 1
