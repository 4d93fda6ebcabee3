"""Error and cost of a target at each candidate rank: what every budget is spread by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from slimrank.budget.ranks import Rank
from slimrank.errors import PlanError
from slimrank.layers.forms import PAIR
from slimrank.layers.layer_form import LayerForm

DENSE = -1  # stands for "dense" among the integer ranks of a curve
Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Candidate ranks of one target, cheapest first.

    Attributes:
        path: the target.
        ranks: int64, `DENSE` for the weight as it is.
        costs: int64, bits stored at each rank, strictly increasing; any other unit that all curves share.
        errors: float64, not increasing, in a unit that all curves of a problem share.

    Raises:
        PlanError: no candidates, costs that do not increase, or errors that increase or are not finite.
    """

    path: str
    ranks: Integers
    costs: Integers
    errors: Floats

    def __post_init__(self) -> None:
        if not len(self.ranks) == len(self.costs) == len(self.errors) or not len(self.ranks):
            raise PlanError(f"the curve of '{self.path}' has no candidate ranks, or lists of other lengths.")
        if not np.isfinite(self.errors).all() or (self.errors < 0).any():
            rank = self.rank(int(np.argmax(~np.isfinite(self.errors) | (self.errors < 0))))
            raise PlanError(f"the error of '{self.path}' at rank {rank} is NaN, infinite or negative.", _SOUND)
        rising = np.flatnonzero(np.diff(self.errors) > 0)
        if len(rising):
            raise PlanError(
                f"the error of '{self.path}' rises from rank {self.rank(rising[0])} to {self.rank(rising[0] + 1)}.",
                "`isotonic` takes the noise out of measured curves",
            )
        if (np.diff(self.costs) <= 0).any():
            raise PlanError(f"the costs of '{self.path}' do not increase with its rank.")

    def __len__(self) -> int:
        return len(self.ranks)

    def rank(self, index: int) -> Rank:
        """Return the rank of a candidate."""
        rank = int(self.ranks[index])
        return "dense" if rank == DENSE else rank

    def index(self, rank: Rank) -> int:
        """Return the candidate of this rank.

        Raises:
            PlanError: it is none.
        """
        found = np.flatnonzero(self.ranks == (DENSE if rank == "dense" else rank))
        if not len(found):
            raise PlanError(f"rank {rank} is not a candidate of '{self.path}'.")
        return int(found[0])

    def largest_within(self, cost: int) -> int:
        """Return the candidate that stores most within a cost; -1 if none fits."""
        return int(np.searchsorted(self.costs, cost, side="right")) - 1

    def scaled(self, factor: float) -> Curve:
        """Multiply the errors by a factor."""
        return replace(self, errors=self.errors * factor)

    def choose(self, kept: NDArray[np.bool_]) -> Curve:
        """Return some of the candidates."""
        return Curve(self.path, self.ranks[kept], self.costs[kept], self.errors[kept])


@dataclass(frozen=True)
class Limits:
    """What ranks a target may have.

    Attributes:
        least: smallest rank, at least 1.
        most: largest rank; None for no bound, which allows the dense weight, too.
        dense: the weight is to stay as it is.

    Raises:
        PlanError: a bound below 1, or no rank between them.
    """

    least: int = 1
    most: int | None = None
    dense: bool = False

    def __post_init__(self) -> None:
        if self.least < 1 or (self.most is not None and self.most < 1):
            raise PlanError(f"ranks from {self.least} to {self.most} are asked for; the smallest rank is 1.")
        if self.most is not None and self.most < self.least:
            raise PlanError(f"ranks from {self.least} to {self.most} are asked for; there are none.")

    def both(self, other: Limits) -> Limits | None:
        """Return what both allow; None where that is nothing."""
        bounded = self.most is not None or other.most is not None
        if self.dense or other.dense:
            return None if bounded else Limits(dense=True)
        least = max(self.least, other.least)
        most = min(m for m in (self.most, other.most) if m is not None) if bounded else None
        return None if most is not None and most < least else Limits(least, most)

    @classmethod
    def all_of(cls, several: Iterable[Limits]) -> Limits:
        """Return what all of several allow.

        Raises:
            PlanError: nothing.
        """
        found: Limits | None = cls()
        for limits in several:
            found = found.both(limits) if found is not None else None
        if found is None:
            raise PlanError("bounds of ranks that must be equal leave none.", "bounds that overlap")
        return found


def candidates(
    path: str,
    shape: tuple[int, int],
    multiple: int = 1,
    limits: Limits | None = None,
    form: LayerForm = PAIR,
    width: int = 1,
) -> tuple[Integers, Integers]:
    """Return ranks (multiples of `multiple`, then `DENSE`) and the bits that they store.

    Args:
        path: the target, for messages.
        shape: (m, n).
        multiple: ranks are multiples of this; a rank that `limits` fixes need not be one.
        limits: what ranks it may have.
        form: what the weight is stored as.
        width: bits of a number of the dense weight.

    Raises:
        PlanError: no rank is left.
    """
    limits = limits or Limits()
    top = form.largest_rank(*shape, width)
    most = top if limits.most is None else min(limits.most, top)
    if limits.dense:
        found: list[int] = []
    elif limits.least == limits.most:
        found = [limits.least] if limits.least <= top else []
    else:
        found = list(range(-(-limits.least // multiple) * multiple, most + 1, multiple))
    whole = [] if limits.most is not None and not limits.dense else [DENSE]
    if not found and not whole:
        raise PlanError(
            f"no multiple of {multiple} is a rank of '{path}' between {limits.least} and {most}.",
            f"'{path}' may have ranks 1..{top}, or stay dense",
        )
    costs = [form.bits(*shape, r, width) for r in found] + [form.bits(*shape, "dense", width)] * len(whole)
    return np.array(found + whole, dtype=np.int64), np.array(costs, dtype=np.int64)


def tails(values: Floats, beyond: float, shape: tuple[int, int], path: str, power: int = 2) -> Floats:
    """Compute T(r) = sum over i >= r of values[i]^power for r = 0 .. k; `beyond` is the energy after the k values.

    Raises:
        PlanError: values that are negative or not finite, or a spectrum that misses a part of its energy.
    """
    if not np.isfinite(values).all() or (values < 0).any():
        raise PlanError(f"the spectrum of '{path}' is not finite.", _SOUND)
    if len(values) < min(shape) and beyond <= 0:
        raise PlanError(
            f"the spectrum of '{path}' holds {len(values)} of {min(shape)} values, and not the energy of the rest.",
            "errors cannot be compared between layers; the decomposer must give the full spectrum",
        )
    terms = np.append(values.astype(np.float64) ** power, beyond if power == 2 else beyond**0.5)
    return np.cumsum(terms[::-1])[::-1]


def spectral_curve(path: str, tail: Floats, ranks: Integers, costs: Integers, weights: float = 1.0) -> Curve:
    """Return the curve of a target from its tails: weights * T(r), and 0 for the dense weight."""
    kept = ranks < len(tail)
    ranks, costs = ranks[kept], costs[kept]
    errors = np.where(ranks == DENSE, 0.0, weights * tail[np.maximum(ranks, 0)])
    return Curve(path, ranks, costs, np.minimum.accumulate(errors))


def isotonic(errors: Floats) -> Floats:
    """Return the non-increasing sequence nearest to these errors in least squares (pool adjacent violators)."""
    means: list[float] = []
    counts: list[int] = []
    for error in errors.tolist():
        means.append(error)
        counts.append(1)
        while len(means) > 1 and means[-2] < means[-1]:
            count = counts[-2] + counts[-1]
            means[-2:] = [(means[-2] * counts[-2] + means[-1] * counts[-1]) / count]
            counts[-2:] = [count]
    return np.repeat(np.array(means), counts)


_SOUND = "check the calibration data and the model; nothing is planned on such numbers"
