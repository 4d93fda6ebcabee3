"""Integer cost models: how many parameters a target stores at a given rank.

All costs are exact integers; nothing here is ever a float ratio (a rank that goes through a float comes
back one smaller for about 5 % of ranks).
"""

from __future__ import annotations

from typing import Literal

Rank = int | Literal["dense"]


def dense_cost(m: int, n: int) -> int:
    """Parameters of a dense m x n weight."""
    return m * n


def pair_cost(m: int, n: int, rank: Rank) -> int:
    """Parameters of the pair B (m x rank), A (rank x n), or of the dense weight."""
    return dense_cost(m, n) if rank == "dense" else rank * (m + n)


def max_pair_rank(m: int, n: int) -> int:
    """Largest rank at which the pair is smaller than the dense weight (0 when there is none)."""
    return (m * n - 1) // (m + n)
