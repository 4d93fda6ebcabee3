"""What a target may become where form, rank and bits are chosen together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import inf

import numpy as np

from slimrank.budget.curves import Curve, Floats, Integers
from slimrank.budget.ranks import Rank

MEASURED_BITS = 4  # in which rounding is tried
PER_BIT = 4.0  # one bit more halves each step, and quarters the squared error
GUESS = 0.01  # of the energy, lost in 4 bits, before it is measured


@dataclass(frozen=True)
class Family:
    """What candidates that differ in their bits only have in common.

    Attributes:
        form: the name of their form, with {} where the scheme stands.
        rank: of the form.
    """

    form: str
    rank: Rank


@dataclass(frozen=True)
class Candidate:
    """One way to store a target.

    Attributes:
        family: form and rank; None for the dense weight as it is.
        form: with what its numbers are rounded to; None for the dense weight as it is.
        width: bits of its integers; 0 where nothing is rounded.
        cost: bits that it stores.
    """

    family: Family | None
    form: str | None
    width: int
    cost: int

    @property
    def rank(self) -> Rank:
        """Return the rank of its form."""
        return self.family.rank if self.family else "dense"


@dataclass(frozen=True)
class Loss:
    """What a family loses of a target in the metric of the method, as a fraction of the target's energy there.

    Attributes:
        at_four: by rounding to 4 bits.
        cut: by its rank.
    """

    at_four: float
    cut: float = 0.0

    def at(self, width: int) -> float:
        """Return the whole loss in so many bits: each bit more is a quarter of what rounding loses."""
        return self.cut + self.at_four * PER_BIT ** (MEASURED_BITS - width)


@dataclass(frozen=True)
class Menu:
    """The candidates of a target, cheapest first.

    Attributes:
        candidates: see above.
        losses: what families lose; empty before that is measured. A family without a loss is not chosen.
    """

    candidates: tuple[Candidate, ...]
    losses: Mapping[Family, Loss] = field(default_factory=dict)

    @classmethod
    def of(cls, candidates: Iterable[Candidate]) -> Menu:
        """Sort candidates by what they cost."""
        return cls(tuple(sorted(candidates, key=lambda c: (c.cost, -c.width))))

    def measured(self, losses: Mapping[Family, Loss]) -> Menu:
        """Return the menu with what families lose."""
        return replace(self, losses=losses)

    @property
    def families(self) -> list[Family]:
        """Return the families of the candidates, each once."""
        return list(dict.fromkeys(c.family for c in self.candidates if c.family is not None))

    @property
    def choices(self) -> tuple[Integers, Integers]:
        """Return the numbers of the candidates, and the bits that they store."""
        costs = np.array([c.cost for c in self.candidates], dtype=np.int64)
        return np.arange(len(costs), dtype=np.int64), costs

    def errors(self) -> Floats:
        """Return the loss of each candidate as a fraction of the outputs' energy; a guess before it is measured."""
        return np.array([self._loss(candidate) for candidate in self.candidates])

    def _loss(self, candidate: Candidate) -> float:
        if candidate.family is None:
            return 0.0
        if not self.losses:
            return _guessed(candidate.family).at(candidate.width)
        loss = self.losses.get(candidate.family)
        return inf if loss is None else loss.at(candidate.width)

    def worth_measuring(self, family: Family, cut: float) -> bool:
        """Tell whether a family that loses so much by its rank could beat dense weights of as many bits.

        Always where nothing is known of dense weights, or where it stores less than all of them.
        """
        dense = [c for c in self.candidates if c.rank == "dense" and c.family in self.losses]
        if not dense:
            return True
        mine = (c for c in self.candidates if c.family == family)
        costs, losses = zip(*((c.cost, np.log2(self._loss(c))) for c in dense), strict=True)
        return any(c.cost < costs[0] or cut < 2 ** np.interp(c.cost, costs, losses) for c in mine)

    def curve(self, path: str, energy: float) -> Curve:
        """Return the curve of a target whose outputs have this energy: its candidates that no cheaper one beats.

        What stands for ranks in it are the numbers of candidates.
        """
        numbers, costs = self.choices
        errors = self.errors()
        order = np.lexsort((errors, costs))
        numbers, costs, errors = numbers[order], costs[order], errors[order]
        kept = errors < np.concatenate(([inf], np.minimum.accumulate(errors)[:-1]))
        return Curve(path, numbers[kept], costs[kept], energy * errors[kept])


def _guessed(family: Family) -> Loss:
    """Guess what a family loses: a correction takes a tenth off, and factors are not chosen unmeasured."""
    if family.rank == "dense":
        return Loss(GUESS)
    return Loss(0.9 * GUESS) if family.form.startswith("residual") else Loss(GUESS, cut=1.0)
