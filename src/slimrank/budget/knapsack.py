"""The budget solver: one candidate for each curve, least total error within the budget (multiple-choice knapsack).

The Lagrangian relaxation is solved exactly, along the lower hulls; what it leaves of the budget is filled and then
improved by exchanges. Its dual bound is a certificate: no plan within the budget has less error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from slimrank.budget.curves import Curve, Floats, Integers
from slimrank.budget.hulls import Steps, Table, hull_steps
from slimrank.budget.ranks import Rank
from slimrank.errors import BudgetError

MAX_EXCHANGE_ROUNDS = 40  # of exchanges; each one lowers the error
STEPS_BEYOND_BUDGET = 8  # steps beyond the budget that are tried, and made room for
GOOD_GAP = 1e-5  # relative gap that is good enough
ERROR_ROUNDING = 1e-9  # of the error: rounding


Room = Callable[[Integers], Integers]


@dataclass(frozen=True)
class Solution:
    """A plan and its certificate.

    Attributes:
        ranks: path -> rank.
        cost: parameters stored.
        error: sum of the errors.
        bound: no plan within the budget has less.
    """

    ranks: dict[str, Rank]
    cost: int
    error: float
    bound: float

    @property
    def gap(self) -> float:
        """(error - bound) / error: how far the plan may be from the best, relatively."""
        return max(0.0, (self.error - self.bound) / self.error) if self.error > 0 else 0.0


@dataclass(frozen=True)
class TradeOff:
    """The least error at each size, along the lower hulls.

    Attributes:
        costs: int64, increasing.
        errors: float64, decreasing.
    """

    costs: Integers
    errors: Floats


def solve(curves: Sequence[Curve], budget: int) -> Solution:
    """Choose ranks of least total error that store no more than `budget`, and certify them.

    No target could grow by one candidate within what is left. Scaling all errors, or another order of the curves,
    changes nothing.

    Raises:
        BudgetError: even the smallest candidates store more.
    """
    ordered = sorted(curves, key=lambda curve: curve.path)
    check_feasible(ordered, budget)
    table = Table.of(ordered)
    steps = hull_steps(table)
    count, bound = relaxed(table, steps, budget)
    picks = steps.picks(count)
    fill(table, picks, budget)
    if table.total(picks)[1] - bound > GOOD_GAP * table.total(picks)[1]:
        core = possible(ordered, bound, table.total(picks)[1], steps.price(count))
        better = _best_start(core, budget, bound)
        picks = np.array([c.index(core[i].rank(p)) for i, (c, p) in enumerate(zip(ordered, better, strict=True))])
        fill(table, picks, budget)
    found = planned(ordered, picks, bound)
    return replace(found, ranks={curve.path: found.ranks[curve.path] for curve in curves})


def planned(curves: Sequence[Curve], picks: Integers, bound: float) -> Solution:
    """Return the plan of one candidate for each curve."""
    cost, error = Table.of(curves).total(picks)
    ranks = {curve.path: curve.rank(int(pick)) for curve, pick in zip(curves, picks, strict=True)}
    return Solution(ranks, cost, error, min(bound, error))


def possible(curves: Sequence[Curve], bound: float, error: float, price: float) -> list[Curve]:
    """Find candidates that a plan of less error may hold, by their reduced cost at the price of a parameter."""
    reduced = [curve.errors + price * curve.costs for curve in curves]
    room = max(error - bound, 0.0) + ERROR_ROUNDING * error
    return [curve.choose(r - r.min() <= room) for curve, r in zip(curves, reduced, strict=True)]


def trade_off(curves: Sequence[Curve]) -> TradeOff:
    """Return the whole path of error against size at once."""
    table = Table.of(sorted(curves, key=lambda curve: curve.path))
    steps = hull_steps(table)
    cost, error = table.total(steps.start)
    costs = np.append(cost, cost + np.cumsum(steps.cost))
    return TradeOff(costs, np.maximum(np.append(error, error - np.cumsum(steps.gain)), 0.0))


def in_parameters(parameters: int) -> str:
    """Return a budget, in words."""
    return f"a budget of at least {parameters} parameters"


def check_feasible(
    curves: Sequence[Curve], budget: int, needed: Callable[[int], str] = in_parameters, noun: str = "parameters"
) -> None:
    """Make sure that the smallest candidates fit.

    Args:
        curves: all candidates.
        budget: in all, in the unit of the costs.
        needed: so many of that unit -> the budget that allows them, in words.
        noun: what the unit is called.

    Raises:
        BudgetError: they do not.
    """
    least = sum(int(curve.costs[0]) for curve in curves)
    if least > budget:
        largest = max(curves, key=lambda curve: int(curve.costs[0]))
        raise BudgetError(
            f"the smallest ranks allowed store {least:,} {noun}, the budget is {budget:,}; '{largest.path}' alone "
            f"takes {int(largest.costs[0]):,} at rank {largest.rank(0)}.",
            f"{needed(least)}; or smaller least ranks",
        )


def relaxed(table: Table, steps: Steps, budget: int) -> tuple[int, float]:
    """Tell how many steps fit in a row, and the optimum of the linear relaxation.

    That is taken from the errors that remain: less all gains from the first errors, it would be lost in their rounding
    where one of them is huge.
    """
    cost, _ = table.total(steps.start)
    spent = cost + np.cumsum(steps.cost)
    count = int(np.searchsorted(spent, budget, side="right"))
    _, bound = table.total(steps.picks(count))
    if count < len(steps.cost):
        left = budget - (int(spent[count - 1]) if count else cost)
        bound -= float(steps.gain[count]) * left / int(steps.cost[count])
    return count, max(bound, 0.0)


def _best_start(curves: Sequence[Curve], budget: int, bound: float) -> Integers:
    """Improve from the steps that fit, and from a few more less their excess: one step may be too large to miss."""
    table = Table.of(curves)
    steps = hull_steps(table)
    count, _ = relaxed(table, steps, budget)
    best, least = steps.picks(count), np.inf
    for n in range(count, min(count + STEPS_BEYOND_BUDGET, len(steps.cost)) + 1):
        picks = _improved(table, steps.picks(n), budget)
        error = table.total(picks)[1]
        if error < least:
            best, least = picks, error
        if least - bound <= GOOD_GAP * least:
            break
    return best


def _improved(table: Table, picks: Integers, budget: int) -> Integers:
    """Give back until within the budget, and exchange."""
    shed(table, picks, budget)
    _exchange(table, picks, budget)
    return picks


def shed(table: Table, picks: Integers, budget: int) -> None:
    """Give back, again and again, where that costs least error per parameter, until within the budget. In place."""
    over = table.total(picks)[0] - budget
    while over > 0:
        costs, gains = _moves(table, picks)
        worth = np.where(costs < 0, gains / np.where(costs < 0, np.minimum(-costs, over), 1), -np.inf)
        row, pick = np.unravel_index(int(np.argmax(worth)), worth.shape)
        over += int(costs[row, pick])
        picks[row] = pick


def fill(table: Table, picks: Integers, budget: int, room: Room | None = None) -> None:
    """Spend what is left: again and again the move that gains most per parameter, until none fits. In place.

    Args:
        table: all candidates.
        picks: the plan.
        budget: parameters in all.
        room: picks -> how many more parameters each row may store, where that is bounded, too.
    """
    left = budget - table.total(picks)[0]
    while True:
        costs, gains = _moves(table, picks)
        fits = (costs > 0) & (costs <= (left if room is None else np.minimum(left, room(picks))[:, None]))
        worth = np.where(fits, np.maximum(gains, 0) / np.where(fits, costs, 1), -1.0)
        best = int(np.argmax(worth))
        row, pick = np.unravel_index(best, worth.shape)
        if worth[row, pick] < 0:
            return
        left -= int(costs[row, pick])
        picks[row] = pick


def _exchange(table: Table, picks: Integers, budget: int) -> None:
    """Fill, then let one row give what another gains more by, as long as that helps. In place."""
    for _ in range(MAX_EXCHANGE_ROUNDS):
        fill(table, picks, budget)
        better = _best_exchange(table, picks, budget - table.total(picks)[0])
        if better is None:
            return
        for row, pick in better:
            picks[row] = pick
    fill(table, picks, budget)


def _best_exchange(table: Table, picks: Integers, left: int) -> list[tuple[int, int]] | None:
    costs, gains = _moves(table, picks)
    up_rows, up_picks = np.nonzero((costs > 0) & np.isfinite(gains) & (gains > 0))
    down_rows, down_picks = np.nonzero(costs < 0)
    if not len(up_rows) or not len(down_rows):
        return None
    order = np.argsort(costs[up_rows, up_picks], kind="stable")
    up_rows, up_picks = up_rows[order], up_picks[order]
    up_costs, up_gains = costs[up_rows, up_picks], gains[up_rows, up_picks]
    leader = np.maximum.accumulate(up_gains)
    first = np.maximum.accumulate(np.where(up_gains == leader, np.arange(len(leader)), 0))
    allowed = np.searchsorted(up_costs, left - costs[down_rows, down_picks], side="right") - 1
    partner = first[np.maximum(allowed, 0)]
    net = up_gains[partner] + gains[down_rows, down_picks]
    net[(allowed < 0) | (up_rows[partner] == down_rows)] = -np.inf
    best = int(np.argmax(net))
    scale = float(table.errors[np.arange(len(picks)), picks].sum())
    if net[best] <= 1e-12 * scale:
        return None
    up = partner[best]
    return [(int(down_rows[best]), int(down_picks[best])), (int(up_rows[up]), int(up_picks[up]))]


def _moves(table: Table, picks: Integers) -> tuple[Integers, Floats]:
    """Return what each candidate would cost and gain instead of the one picked; beyond the end of a row none fits."""
    rows = np.arange(len(picks))[:, None]
    now = picks[:, None]
    return table.costs - table.costs[rows, now], table.errors[rows, now] - table.errors
