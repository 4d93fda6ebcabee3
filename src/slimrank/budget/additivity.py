"""Whether errors of layers add up: what plans are predicted to lose against what they do lose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slimrank.budget.curves import Curve
from slimrank.budget.knapsack import solve
from slimrank.budget.measured_curves import effect_of
from slimrank.budget.problem import Problem

WEIGHT_LOG_DEVIATION = 1.0  # standard deviation of the logarithm of a layer's weight


@dataclass(frozen=True)
class Additivity:
    """Predicted and measured losses of random plans of one size.

    Attributes:
        spearman: rank correlation of the two; 1 where predictions order plans as measurements do, None where either
            is the same for all plans.
        predicted: sum of the single errors of each plan.
        measured: divergence of the whole model under it, in nats a token.
    """

    spearman: float | None
    predicted: tuple[float, ...]
    measured: tuple[float, ...]


def additivity(problem: Problem, curves: Sequence[Curve], plans: int) -> Additivity:
    """Compare predictions with measurements for plans that are best for randomly weighed curves.

    Args:
        problem: has a probe.
        curves: errors of single layers.
        plans: how many; the same ones for the same problem.
    """
    from scipy.stats import spearmanr  # half a second to import

    random = np.random.default_rng(0)
    predicted, measured = [], []
    for _ in range(plans):
        weights = np.exp(WEIGHT_LOG_DEVIATION * random.normal(size=len(curves)))
        ranks = solve(*problem.in_units([c.scaled(float(w)) for c, w in zip(curves, weights, strict=True)])).ranks
        predicted.append(sum(float(c.errors[c.index(ranks[c.path])]) for c in curves))
        measured.append(effect_of(problem, ranks).kl)
    differ = np.ptp(predicted) > 0 and np.ptp(measured) > 0
    correlation = float(spearmanr(predicted, measured).statistic) if differ else None
    return Additivity(correlation, tuple(predicted), tuple(measured))
