"""Shrink statistics of rarely used experts towards the pooled statistics of their kind.

A router sends each token to a few experts, so some experts get hardly any. The gram of such an expert's inputs is
shrunk towards the pooled gram of all experts of the kind. (For layers that read the router's input this is the gram of
that input, with every token counted once for each expert that it is sent to.) The noise of so few tokens sets the
weight:

    C_e <- (1 - w) C_e + w P,    w = min(1, ((tr C_e)^2 + tr C_e^2) / (N_e |C_e - P|_F^2))

per token, with P the mean over all tokens of the kind. The numerator over N_e is the expected squared error of a gram
of N_e Gaussian tokens; the denominator is that error plus the true difference (Ledoit and Wolf, 2004, with a target
that is not the identity).
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from functools import reduce
from operator import add

from slimrank.statistics.accumulators import GramSum
from slimrank.statistics.catalogue import Need
from slimrank.statistics.layer_statistics import LayerStatistics

UNREACHED = "no calibration token reached this expert: the inputs of the others stand in"


def shrink_rare_experts(
    statistics: MutableMapping[str, LayerStatistics],
    kinds: Sequence[Mapping[str, tuple[int, int]]],
    needs: frozenset[Need],
) -> None:
    """Shrink the inputs' grams of experts, in place; experts that no token reached get one token's worth of the mean.

    Args:
        statistics: layer -> what was gathered.
        kinds: for each kind of expert layers: layer -> (m, n).
        needs: what the method asks for.
    """
    for shapes in kinds:
        known = {path: statistics[path].inputs for path in shapes if path in statistics}
        grams = [gram for gram in known.values() if gram is not None and gram.count]
        if not grams:
            continue
        pooled = reduce(add, grams)
        for path, shape in shapes.items():
            mine = statistics.setdefault(path, LayerStatistics(shape, needs))
            if mine.inputs is not None and mine.inputs.count:
                mine.inputs = shrunk(mine.inputs, pooled)
            else:
                mine.inputs = _scaled(pooled, 1 / pooled.count, 0)
                mine.notes = (*mine.notes, UNREACHED)


def shrunk(own: GramSum, pooled: GramSum) -> GramSum:
    """Shrink the gram of an expert's inputs towards the pooled gram; the number of tokens does not change."""
    weight = trust_in_all(own, pooled)
    return _scaled(own, 1 - weight, own.count) + _scaled(pooled, weight * own.count / pooled.count, 0)


def trust_in_all(own: GramSum, pooled: GramSum) -> float:
    """Return w of the formula above, between 0 and 1."""
    mine, mean = own.gram / own.count, pooled.gram / pooled.count
    noise = float(mine.diagonal().sum()) ** 2 + float(mine.square().sum())
    difference = own.count * float((mine - mean).square().sum())
    return min(1.0, noise / difference) if difference > 0 else 1.0


def _scaled(sums: GramSum, factor: float, count: int) -> GramSum:
    return GramSum(sums.gram * factor, sums.total * factor, count)
