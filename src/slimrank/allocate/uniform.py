"""Uniform allocation: every target keeps the same fraction of its parameters."""

from __future__ import annotations

from collections.abc import Mapping

from slimrank.allocate.plan import Shapes
from slimrank.allocate.registry import allocator
from slimrank.errors import BudgetError
from slimrank.linalg.cost import Rank, dense_cost, pair_cost


@allocator(
    id="uniform",
    title="Uniform: every target keeps the same fraction of its parameters",
    paper="the baseline of all papers",
)
def uniform(shapes: Shapes, budget: int, rank_multiple: int = 1) -> Mapping[str, Rank]:
    """The largest ranks with cost(rank) <= budget / total * cost(dense), per target; dense where that fits.

    Equal shapes get equal ranks. The slack is below one step of every target taken alone; it is not handed out,
    since that would break the equality.

    Raises:
        BudgetError: a target cannot reach even the smallest rank within its share.
    """
    total = sum(dense_cost(*shape) for shape in shapes.values())
    ranks: dict[str, Rank] = {}
    for path, (m, n) in shapes.items():
        share = m * n * budget // total
        rank = share // (m + n) // rank_multiple * rank_multiple
        ranks[path] = "dense" if share >= m * n else rank
        if rank < 1:
            least = max(pair_cost(*shape, rank_multiple) / dense_cost(*shape) for shape in shapes.values())
            raise BudgetError(
                f"'{path}' ({m} x {n}) may store {share:,} parameters; rank {rank_multiple} alone takes "
                f"{pair_cost(m, n, rank_multiple):,}.",
                f"a keep_ratio of at least {least:.4f}" + (", or a smaller rank_multiple" if rank_multiple > 1 else ""),
            )
    return ranks
