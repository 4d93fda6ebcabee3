"""Integer cost models: how many parameters a target stores at a given rank.

All costs are exact integers; nothing here is ever a float ratio (a rank that goes through a float comes
back one smaller for about 5 % of ranks).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Rank = int | Literal["dense"]
FactorForm = Literal["pair", "pivot"]


def dense_cost(m: int, n: int) -> int:
    """Parameters of a dense m x n weight."""
    return m * n


def pair_cost(m: int, n: int, rank: Rank) -> int:
    """Parameters of the pair B (m x rank), A (rank x n), or of the dense weight."""
    return dense_cost(m, n) if rank == "dense" else rank * (m + n)


def max_pair_rank(m: int, n: int) -> int:
    """Largest rank at which the pair is smaller than the dense weight (0 when there is none)."""
    return (m * n - 1) // (m + n)


def pivot_cost(m: int, n: int, rank: Rank) -> int:
    """Parameters of a rank-r weight stored as r of its rows and the others' coordinates in them: r (m + n) - r^2."""
    return dense_cost(m, n) if rank == "dense" else rank * (m + n - rank)


def max_pivot_rank(m: int, n: int) -> int:
    """Largest rank at which that is smaller than the dense weight: r (m + n) - r^2 = m n - (m - r) (n - r)."""
    return min(m, n) - 1


@dataclass(frozen=True)
class CostModel:
    """What a weight of m x n stores at a rank.

    Attributes:
        name: as in a plan.
        of: (m, n, rank) -> parameters.
        largest: (m, n) -> the largest rank that stores less than the dense weight.
    """

    name: FactorForm
    of: Callable[[int, int, Rank], int]
    largest: Callable[[int, int], int]

    def within(self, m: int, n: int, parameters: int) -> int:
        """The largest rank up to min(m, n) that stores no more than so many parameters; -1 below none."""
        return bisect_right(range(min(m, n) + 1), parameters, key=lambda rank: self.of(m, n, rank)) - 1


PAIR = CostModel("pair", pair_cost, max_pair_rank)
PIVOT = CostModel("pivot", pivot_cost, max_pivot_rank)
COST_MODELS: dict[FactorForm, CostModel] = {"pair": PAIR, "pivot": PIVOT}
