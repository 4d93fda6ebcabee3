"""Curves from measurements at a few ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from slimrank.allocate.curve import DENSE, Curve, Floats, isotonic
from slimrank.allocate.problem import Effect, Item, Problem
from slimrank.errors import PlanError

LEAST = 1e-9  # nats; what is less is rounding


def anchor_ranks(problem: Problem, item: Item, fractions: Sequence[float]) -> list[int]:
    """Ranks at these fractions of the largest that stores less than the dense weight; each once."""
    top = problem.cost.largest(*item.shape)
    return sorted({max(1, min(round(f * top), min(item.shape) - 1)) for f in fractions})


def measure(problem: Problem, fractions: Sequence[float]) -> dict[str, tuple[list[int], list[Effect]]]:
    """Ranks and effects of each target alone.

    Raises:
        PlanError: an effect that is not finite.
    """
    ranks = {item.path: anchor_ranks(problem, item, fractions) for item in problem.items}
    effects = problem.measured().single(ranks)
    for path, found in effects.items():
        if not np.isfinite(found).all():
            raise PlanError(f"the divergence measured for '{path}' is not finite.", "run in float32 (--dtype float32)")
    return {path: (ranks[path], effects[path]) for path in ranks}


def anchored_curves(problem: Problem, anchors: Sequence[float]) -> list[Curve]:
    """KL(r) = T(r) * exp(linear interpolation of log(KL / T) between the anchors), constant beyond them."""
    curves = []
    measured = measure(problem, anchors)
    for item, curve in zip(problem.items, problem.curves(), strict=True):
        ranks, effects = measured[item.path]
        tail = np.maximum(problem.tail(item)[ranks], np.finfo(float).tiny)
        ratio = np.log(np.maximum([e.kl for e in effects], LEAST)) - np.log(tail)
        factor = np.exp(np.interp(curve.ranks, ranks, ratio))
        curves.append(replace(curve, errors=_falling(curve.errors * factor, curve)))
    return curves


def interpolated_curves(problem: Problem, fractions: Sequence[float]) -> list[Curve]:
    """Increase of the negative log-likelihood at every rank, from that measured at some.

    Between them it is interpolated linearly in the rank; below them it goes on along the line through the least two.
    """
    curves = []
    measured = measure(problem, fractions)
    base = problem.measured().joint({item.path: "dense" for item in problem.items}).nll
    for item, curve in zip(problem.items, problem.flat_curves(), strict=True):
        ranks, effects = measured[item.path]
        top = min(item.shape)
        points = np.append(np.array(ranks, dtype=np.float64), top)
        losses = np.append(isotonic(np.maximum([e.nll - base for e in effects], 0.0)), 0.0)
        slope = (losses[1] - losses[0]) / (points[1] - points[0])
        below = losses[0] + slope * (np.minimum(curve.ranks, points[0]) - points[0])
        errors = np.where(curve.ranks < points[0], below, np.interp(curve.ranks, points, losses))
        curves.append(replace(curve, errors=_falling(errors, curve)))
    return curves


def _falling(errors: Floats, curve: Curve) -> Floats:
    """Isotonic, and zero for the dense weight."""
    return isotonic(np.where(curve.ranks == DENSE, 0.0, errors))
