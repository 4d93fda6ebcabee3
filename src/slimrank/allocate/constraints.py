"""Side constraints by decoder block, besides the budget, and whether they can be met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import ceil, floor

import numpy as np
from scipy.optimize import LinearConstraint
from scipy.sparse import csr_array

from slimrank.allocate.curve import Curve, Integers
from slimrank.errors import BudgetError
from slimrank.linalg.cost import Rank

ROUNDING = 1e-9  # of a block
DIGITS = 10**4  # of a fraction in a hint


@dataclass(frozen=True)
class Constraints:
    """What a plan must keep.

    Attributes:
        blocks: path -> decoder block.
        whole: path -> parameters of the dense weight.
        monotone: a block keeps no larger a fraction of its parameters than the one before.
        floor: least fraction that a block keeps.
        cap: largest fraction that a block keeps.
    """

    blocks: Mapping[str, int]
    whole: Mapping[str, int]
    monotone: bool = False
    floor: float = 0.0
    cap: float = 1.0

    @property
    def any(self) -> bool:
        """Whether it constrains anything."""
        return self.monotone or self.floor > 0 or self.cap < 1


@dataclass(frozen=True)
class Block:
    """The curves of a decoder block, by path, and the parameters of its dense weights."""

    number: int
    curves: Sequence[Curve]
    whole: int

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
    found = []
    for number, group in groupby(ordered, key=lambda curve: constraints.blocks[curve.path]):
        members = list(group)
        found.append(Block(number, members, sum(constraints.whole[c.path] for c in members)))
    return found


def reachable_blocks(curves: Sequence[Curve], budget: int, constraints: Constraints) -> list[Block]:
    """The blocks in order, each of which can keep what it must, and all of them together within the budget.

    Raises:
        BudgetError: they cannot.
    """
    blocks = _blocks_of(curves, constraints)
    _check_reachable(blocks, budget, constraints)
    return blocks


def _check_reachable(blocks: Sequence[Block], budget: int, constraints: Constraints) -> None:
    if constraints.floor > constraints.cap:
        raise BudgetError(
            f"the block_floor {constraints.floor:g} is above the block_cap {constraints.cap:g}.",
            f"a block_floor of at most {constraints.cap:g}",
        )
    for block in blocks:
        if block.most < constraints.floor - ROUNDING:
            raise BudgetError(
                f"block {block.number} keeps at most {block.most:.4f} of its parameters, at its largest ranks; "
                f"block_floor asks for {constraints.floor:g}.",
                f"a block_floor of at most {down(block.most):.4f}",
            )
        if block.least > constraints.cap + ROUNDING:
            raise BudgetError(
                f"block {block.number} keeps at least {block.least:.4f} of its parameters, at its smallest ranks; "
                f"block_cap asks for {constraints.cap:g}.",
                f"a block_cap of at least {ceil(block.least * DIGITS) / DIGITS:.4f}",
            )
    if constraints.monotone:
        _check_order(blocks)
    _check_sum(blocks, budget, constraints)


def down(fraction: float) -> float:
    """Rounded down to four digits."""
    return floor(fraction * DIGITS + ROUNDING) / DIGITS


def _check_order(blocks: Sequence[Block]) -> None:
    tightest = blocks[0]
    for block in blocks:
        if block.least > tightest.most + ROUNDING:
            raise BudgetError(
                f"block {block.number} keeps at least {block.least:.4f} of its parameters and block "
                f"{tightest.number}, before it, at most {tightest.most:.4f}: they cannot fall with depth.",
                "bounds of ranks that leave them room, or monotone=false",
            )
        tightest = min(tightest, block, key=lambda b: b.most)


def _check_sum(blocks: Sequence[Block], budget: int, constraints: Constraints) -> None:
    def needed(least: float) -> float:
        fractions = np.maximum([b.least for b in blocks], least)
        if constraints.monotone:
            fractions = np.maximum.accumulate(fractions[::-1])[::-1]
        return float((fractions * [b.whole for b in blocks]).sum())

    if needed(constraints.floor) <= budget + ROUNDING * budget:
        return
    depth = " and falls with depth" if constraints.monotone else ""
    largest = max(blocks, key=lambda b: b.whole)
    fitting = [f for f in np.arange(DIGITS) / DIGITS if needed(f) <= budget]
    raise BudgetError(
        f"where every block keeps at least {constraints.floor:g}{depth}, they store {needed(constraints.floor):,.0f} "
        f"parameters, block {largest.number} alone {max(largest.least, constraints.floor) * largest.whole:,.0f}; the "
        f"budget is {budget:,}.",
        f"a block_floor of at most {max(fitting):.4f}" if fitting else "a larger budget, or monotone=false",
    )


def rows(
    members: Sequence[Sequence[Curve]], whole: Integers, budget: int, constraints: Constraints
) -> list[LinearConstraint]:
    """Budget, floor, cap and order, over all candidates of all curves of all blocks in a row."""
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
    """Whether a plan keeps all constraints."""
    sizes = [sum(int(c.costs[c.index(ranks[c.path])]) for c in block.curves) for block in blocks]
    kept = np.array([size / block.whole for size, block in zip(sizes, blocks, strict=True)])
    falls = not constraints.monotone or bool((np.diff(kept) <= ROUNDING).all())
    return falls and bool((kept >= constraints.floor - ROUNDING).all() and (kept <= constraints.cap + ROUNDING).all())
