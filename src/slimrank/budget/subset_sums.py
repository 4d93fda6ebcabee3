"""What candidates of several curves can add up to: one candidate of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

import numpy as np
from numpy.typing import NDArray

from slimrank.budget.curves import Integers

MAX_SUMS = 2**20  # sums of all curves that are told apart
MAX_SUMS_IN_MEMORY = 2**26  # sums, of one, two, .. curves together


@dataclass(frozen=True)
class Sums:
    """Sums of costs, less the smallest, in units that are rounded down.

    Attributes:
        costs: of the candidates of each curve, increasing.
        unit: parameters; where it divides all costs, sums are exact.
        reached: which sums the first 0, 1, .. curves have.
    """

    costs: Sequence[Integers]
    unit: int
    reached: Sequence[NDArray[np.bool_]]

    @classmethod
    def of(cls, costs: Sequence[Integers]) -> Sums:
        """Return all sums."""
        above = [c - c[0] for c in costs]
        span = sum(int(c[-1]) for c in above)
        most = min(MAX_SUMS, MAX_SUMS_IN_MEMORY // len(costs))
        unit = max(int(np.gcd.reduce(np.concatenate(above))), -(-span // most), 1)
        bits = [1]
        for steps in above:
            bits.append(reduce(or_, (bits[-1] << step for step in (steps // unit).tolist())))
        return cls(costs, unit, [_unpacked(b) for b in bits])

    def at_least(self, size: int) -> Integers | None:
        """Choose the candidates of the smallest sum that is at least this; None if there are none."""
        if sum(int(c[-1]) for c in self.costs) < size:
            return None
        target = max(0, -(-(size - self._smallest) // self.unit))
        above = self.reached[-1][target:]
        picks = self._picks(target + int(np.argmax(above)) if above.any() else len(self.reached[-1]) - 1)
        return picks if self.total(picks) >= size else np.array([len(c) - 1 for c in self.costs])

    def at_most(self, size: int) -> int:
        """Return the largest sum within a size, or the smallest sum."""
        within = np.flatnonzero(self.reached[-1][: max(0, size - self._smallest) // self.unit + 1])
        return self._smallest + int(within[-1]) * self.unit

    def total(self, picks: Integers) -> int:
        """Return what candidates store."""
        return sum(int(c[pick]) for c, pick in zip(self.costs, picks, strict=True))

    @property
    def _smallest(self) -> int:
        return sum(int(c[0]) for c in self.costs)

    def _picks(self, total: int) -> Integers:
        """Return the candidates of a sum that can be reached."""
        picks = []
        for costs, before in zip(self.costs[::-1], self.reached[-2::-1], strict=True):
            rest = total - (costs - costs[0]) // self.unit
            fits = (rest >= 0) & (rest < len(before))
            pick = int(np.argmax(fits & before[np.where(fits, rest, 0)]))
            picks.append(pick)
            total = int(rest[pick])
        return np.array(picks[::-1], dtype=np.int64)


def _unpacked(bits: int) -> NDArray[np.bool_]:
    """Tell whether each bit is set, lowest first."""
    packed = np.frombuffer(bits.to_bytes(-(-bits.bit_length() // 8), "little"), dtype=np.uint8)
    return np.unpackbits(packed, count=bits.bit_length(), bitorder="little").astype(np.bool_)
