"""What a target may become where form, rank and bits are chosen together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from slimrank.budget.curves import Curve, Floats, Integers
from slimrank.budget.ranks import Rank

MEASURED_BITS = 4  # in which rounding is tried
PER_BIT = 4.0  # one bit more halves each step, and quarters the squared error


@dataclass(frozen=True)
class Candidate:
    """One way to store a target.

    Attributes:
        form: with what its numbers are rounded to; None for the dense weight as it is.
        rank: of the form.
        width: bits of its integers; 0 where nothing is rounded.
        cost: bits that it stores.
    """

    form: str | None
    rank: Rank
    width: int
    cost: int


@dataclass(frozen=True)
class Noise:
    """What rounding loses of a target in the metric of the method, as a fraction of its energy there.

    Attributes:
        at_four: of the weight itself in 4 bits.
        left: rank -> fraction of that which is left beside a low-rank correction of this rank.
    """

    at_four: float
    left: dict[int, float]

    def of(self, candidate: Candidate) -> float:
        """Return the loss of a candidate: each bit more is a quarter of it."""
        if candidate.form is None:
            return 0.0
        beside = self.left[candidate.rank] if candidate.rank != "dense" else 1.0
        return self.at_four * beside * PER_BIT ** (MEASURED_BITS - candidate.width)


@dataclass(frozen=True)
class Menu:
    """The candidates of a target, cheapest first; no two cost the same.

    Attributes:
        candidates: see above.
        noise: what rounding loses; None before it is measured.
    """

    candidates: tuple[Candidate, ...]
    noise: Noise | None = None

    @classmethod
    def of(cls, candidates: Sequence[Candidate]) -> Menu:
        """Sort candidates by what they cost; of several that cost the same the one of most bits stays."""
        found = {c.cost: c for c in sorted(candidates, key=lambda c: (c.cost, c.width))}
        return cls(tuple(found[cost] for cost in sorted(found)))

    def measured(self, noise: Noise) -> Menu:
        """Return the menu with what rounding loses."""
        return replace(self, noise=noise)

    @property
    def choices(self) -> tuple[Integers, Integers]:
        """Return the numbers of the candidates, and the bits that they store."""
        costs = np.array([c.cost for c in self.candidates], dtype=np.int64)
        return np.arange(len(costs), dtype=np.int64), costs

    def errors(self) -> Floats:
        """Return the loss of each candidate as a fraction of the outputs' energy; a guess before it is measured."""
        noise = self.noise or Noise(1.0, {int(c.rank): 0.9 for c in self.candidates if c.rank != "dense"})
        return np.array([noise.of(c) for c in self.candidates])

    def curve(self, path: str, energy: float) -> Curve:
        """Return the curve of a target whose outputs have this energy: its candidates that no cheaper one beats.

        What stands for ranks in it are the numbers of candidates.
        """
        numbers, costs = self.choices
        errors = energy * self.errors()
        kept = errors <= np.minimum.accumulate(errors)
        kept[1:] &= errors[1:] < np.minimum.accumulate(errors)[:-1]
        return Curve(path, numbers[kept], costs[kept], errors[kept])
