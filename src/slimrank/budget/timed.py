"""A rank problem whose costs are measured times instead of bits, for the same solver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from slimrank.budget.curves import DENSE, Integers, isotonic
from slimrank.budget.menu import Candidate, Family, Loss, Menu
from slimrank.budget.problem import Item, Problem
from slimrank.budget.ranks import Rank

MAX_CANDIDATES = 128  # ranks of an item
NANOSECONDS = 1e9  # of a second


@dataclass(frozen=True)
class LayerTimes:
    """Measured times of one layer.

    Attributes:
        dense: seconds of the dense layer.
        ranks: at which its form was measured; none is smaller than the one before.
        seconds: at each of these.
    """

    dense: float
    ranks: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, rank: Rank) -> float:
        """Return the seconds at a rank, between measured ones by a straight line; they do not fall with the rank."""
        if rank == "dense":
            return self.dense
        return float(np.interp(rank, self.ranks, -isotonic(-np.array(self.seconds))))


def timed(problem: Problem, times: Mapping[str, LayerTimes], seconds: float) -> Problem:
    """Return the problem with costs in nanoseconds, and a budget of so many seconds.

    A rank at which the form is slower than the dense layer is never chosen, since that loses nothing.

    Args:
        problem: with spectra.
        times: of each item.
        seconds: what all items together may take.
    """
    items = [replace(i, width=1, dense_cost=_nanoseconds(times[i.path].dense)) for i in problem.items]
    choices = zip(problem.items, problem.choices, strict=True)
    menus = {item.path: _menu(problem, item, ranks, times[item.path]) for item, (ranks, _) in choices}
    return replace(problem, items=tuple(items), menus=menus, budget=int(seconds * NANOSECONDS))


def least_seconds(problem: Problem) -> float:
    """Return what the fastest candidates of a timed problem take together."""
    return sum(menu.candidates[0].cost for menu in problem.menus.values()) / NANOSECONDS


def _menu(problem: Problem, item: Item, ranks: Integers, times: LayerTimes) -> Menu:
    """Return the ranks of an item, a part of them where there are many, with their times and losses."""
    tail = problem.tail(item)
    found, losses = [], {}
    for rank in _some(ranks[(ranks != DENSE) & (ranks < len(tail))]):
        family = Family(problem.form.name, rank)
        found.append(Candidate(family, None, 0, _nanoseconds(times.at(rank))))
        losses[family] = Loss(0.0, cut=float(tail[rank] / tail[0]) if tail[0] > 0 else 0.0)
    if DENSE in ranks:
        found.append(Candidate(None, None, 0, _nanoseconds(times.dense)))
    return Menu.of(found).measured(losses)


def _some(ranks: Integers) -> list[int]:
    step = max(1, ceil(len(ranks) / MAX_CANDIDATES))
    return [int(rank) for rank in ranks[::-1][::step][::-1]]


def _nanoseconds(seconds: float) -> int:
    return max(1, round(seconds * NANOSECONDS))
