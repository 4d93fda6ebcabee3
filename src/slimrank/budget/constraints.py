"""Side constraints by decoder block, besides the budget, and whether they can be met."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import ceil, floor
from typing import Any

import numpy as np
from scipy.optimize import LinearConstraint
from scipy.sparse import csr_array

from slimrank.budget.curves import Curve, Integers
from slimrank.budget.ranks import Rank
from slimrank.budget.subset_sums import Sums
from slimrank.errors import BudgetError

BLOCK_ROUNDING = 1e-9  # of a block
BLOCK_TOLERANCE = 1e-12  # of a block: rounding of single products
FRACTION_STEPS = 10**4  # of a fraction in a hint


@dataclass(frozen=True)
class Constraints:
    """What a plan must keep.

    Attributes:
        blocks: path -> decoder block.
        whole: path -> size of the dense weight, in the unit of all costs.
        monotone: a block keeps no larger a fraction of its parameters than the one before.
        floor: least fraction that a block keeps.
        cap: largest fraction that a block keeps.
        noun: what costs are counted in, in words.
    """

    blocks: Mapping[str, int]
    whole: Mapping[str, int]
    monotone: bool = False
    floor: float = 0.0
    cap: float = 1.0
    noun: str = "parameters"

    @property
    def any(self) -> bool:
        """Whether it constrains anything."""
        return self.monotone or self.floor > 0 or self.cap < 1


@dataclass(frozen=True)
class Block:
    """The curves of a decoder block, by path, what they can add up to, and the size of its dense weights."""

    number: int
    curves: Sequence[Curve]
    whole: int
    sums: Sums

    @property
    def least(self) -> float:
        """Fraction that it keeps at its smallest ranks."""
        return sum(int(c.costs[0]) for c in self.curves) / self.whole

    @property
    def most(self) -> float:
        """Fraction that it keeps at its largest ranks."""
        return sum(int(c.costs[-1]) for c in self.curves) / self.whole


def _blocks_of(curves: Sequence[Curve], constraints: Constraints) -> list[Block]:
    ordered = sorted(curves, key=lambda curve: (constraints.blocks[curve.path], curve.path))
    found, known = [], dict[tuple[bytes, ...], Sums]()
    for number, group in groupby(ordered, key=lambda curve: constraints.blocks[curve.path]):
        members = list(group)
        costs = [c.costs for c in members]
        alike = tuple(c.tobytes() for c in costs)
        known[alike] = known.get(alike) or Sums.of(costs)
        found.append(Block(number, members, sum(constraints.whole[c.path] for c in members), known[alike]))
    return found


def reachable_blocks(curves: Sequence[Curve], budget: int, constraints: Constraints) -> list[Block]:
    """Return the blocks in order, which together have a plan that keeps the constraints within the budget.

    Raises:
        BudgetError: they have none.
    """
    blocks = _blocks_of(curves, constraints)
    plan = smallest_plan(blocks, constraints)
    if plan is None or _stored(blocks, plan) > budget:
        raise BudgetError(_reason(blocks, budget, constraints, plan), _remedy(blocks, budget, constraints))
    return blocks


def smallest_plan(blocks: Sequence[Block], constraints: Constraints) -> list[Integers] | None:
    """Return the candidates of each block that store least of all that keep the constraints; None where none do.

    From the last block up: what a block must keep for those after it, it must in every plan that falls with depth.
    """
    found: list[Integers] = []
    least = (0, 1)
    for block in reversed(blocks):
        size = max(
            ceil(constraints.floor * block.whole * (1 - BLOCK_TOLERANCE)), -(-least[0] * block.whole // least[1])
        )
        picks = block.sums.at_least(size)
        if picks is None or block.sums.total(picks) > constraints.cap * block.whole * (1 + BLOCK_TOLERANCE):
            return None
        found.append(picks)
        least = (block.sums.total(picks), block.whole) if constraints.monotone else least
    return found[::-1]


def _stored(blocks: Sequence[Block], plan: Sequence[Integers]) -> int:
    return sum(block.sums.total(picks) for block, picks in zip(blocks, plan, strict=True))


def _reason(blocks: Sequence[Block], budget: int, constraints: Constraints, plan: Sequence[Integers] | None) -> str:
    """Say why no plan within the budget keeps the constraints, the smallest that keeps them being given."""
    low, cap = constraints.floor, constraints.cap
    if low > cap:
        return f"the block_floor {low:g} is above the block_cap {cap:g}."
    depth = " and falls with depth" if constraints.monotone else ""
    if plan is not None:
        sizes = [block.sums.total(picks) for block, picks in zip(blocks, plan, strict=True)]
        largest = int(np.argmax(sizes))
        return (
            f"where every block keeps at least {low:g}{depth}, they store {sum(sizes):,} {constraints.noun}, block "
            f"{blocks[largest].number} alone {sizes[largest]:,}; the budget is {budget:,}."
        )
    alone = next((b for b in blocks if smallest_plan([b], constraints) is None), None)
    if alone is not None:
        return _reason_of(alone, constraints)
    return _disorder(blocks) or f"no ranks keep {low:g} to {cap:g} of every block{depth}."


def _reason_of(block: Block, constraints: Constraints) -> str:
    """Say why a block cannot keep its bounds."""
    if block.most < constraints.floor:
        return (
            f"block {block.number} keeps at most {block.most:.4f} of its parameters, at its largest ranks; "
            f"block_floor asks for {constraints.floor:g}."
        )
    if block.least > constraints.cap:
        return (
            f"block {block.number} keeps at least {block.least:.4f} of its parameters, at its smallest ranks; "
            f"block_cap asks for {constraints.cap:g}."
        )
    return (
        f"no ranks of block {block.number} keep {constraints.floor:g} to {constraints.cap:g} of its parameters; "
        f"the nearest keep {block.sums.at_most(floor(constraints.cap * block.whole)) / block.whole:.4f}."
    )


def _disorder(blocks: Sequence[Block]) -> str | None:
    """Name two blocks that cannot fall with depth at any ranks; None if there are none."""
    tightest = blocks[0]
    for block in blocks:
        if block.least > tightest.most:
            return (
                f"block {block.number} keeps at least {block.least:.4f} of its parameters and block "
                f"{tightest.number}, before it, at most {tightest.most:.4f}: they cannot fall with depth."
            )
        tightest = min(tightest, block, key=lambda b: b.most)
    return None


def _remedy(blocks: Sequence[Block], budget: int, constraints: Constraints) -> str:
    """Return the nearest block_floor that a plan within the budget keeps, else the nearest block_cap, else both."""

    def kept(**changes: Any) -> bool:
        plan = smallest_plan(blocks, replace(constraints, **changes))
        return plan is not None and _stored(blocks, plan) <= budget

    if constraints.floor > 0 and kept(floor=0.0):
        tried = range(floor(min(constraints.floor, constraints.cap) * FRACTION_STEPS + BLOCK_ROUNDING) + 1)
        refused = bisect_left(tried, True, key=lambda f: not kept(floor=f / FRACTION_STEPS))
        return f"a block_floor of at most {(refused - 1) / FRACTION_STEPS:.4f}"
    if constraints.cap < 1 and kept(cap=1.0):
        first = bisect_left(range(FRACTION_STEPS), True, key=lambda c: kept(cap=c / FRACTION_STEPS))
        return f"a block_cap of at least {first / FRACTION_STEPS:.4f}"
    if constraints.floor > 0 and kept(floor=0.0, cap=1.0):
        return f"no block_cap, and {_remedy(blocks, budget, replace(constraints, cap=1.0))}"
    if not constraints.monotone:
        return "a larger budget, or bounds of ranks that leave the blocks room"
    return "bounds of ranks that leave them room, a larger budget, or monotone=false"


def rows(
    members: Sequence[Sequence[Curve]], whole: Integers, budget: int, constraints: Constraints
) -> list[LinearConstraint]:
    """Return budget, floor, cap and order as constraints on all candidates of all curves of all blocks in a row."""
    costs = [np.concatenate([c.costs for c in part]) for part in members]
    starts = np.append(0, np.cumsum([len(c) for c in costs]))
    kept = csr_array(
        (np.concatenate([c / w for c, w in zip(costs, whole, strict=True)]), np.arange(starts[-1]), starts),
        shape=(len(members), int(starts[-1])),
    )
    found = [
        LinearConstraint(csr_array(np.concatenate(costs)[None, :] / max(1, budget)), -np.inf, budget / max(1, budget))
    ]
    found.append(LinearConstraint(kept, constraints.floor, constraints.cap))
    if constraints.monotone and len(members) > 1:
        found.append(LinearConstraint(csr_array(kept[:-1] - kept[1:]), 0, np.inf))
    return found


def keeps(blocks: Sequence[Block], ranks: Mapping[str, Rank], constraints: Constraints) -> bool:
    """Tell whether a plan keeps all constraints."""
    sizes = [sum(int(c.costs[c.index(ranks[c.path])]) for c in block.curves) for block in blocks]
    kept = np.array([size / block.whole for size, block in zip(sizes, blocks, strict=True)])
    falls = not constraints.monotone or bool((np.diff(kept) <= BLOCK_ROUNDING).all())
    return falls and bool(
        (kept >= constraints.floor - BLOCK_ROUNDING).all() and (kept <= constraints.cap + BLOCK_ROUNDING).all()
    )
