"""Curves from measurements at a few ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from slimrank.allocate.curve import DENSE, Curve, Floats, isotonic
from slimrank.allocate.problem import Effect, Item, Problem
from slimrank.errors import NonFiniteError, PlanError
from slimrank.linalg.cost import Rank

LEAST = 1e-9  # nats; what is less is rounding
FLOOR = 1e-6  # of a layer's energy; what is less is rounding


def anchor_ranks(problem: Problem, item: Item, fractions: Sequence[float]) -> list[int]:
    """Ranks at these fractions of the largest that stores less than the dense weight; each once."""
    top = problem.cost.largest(*item.shape)
    return sorted({max(1, min(round(f * top), min(item.shape) - 1)) for f in fractions})


def measure(problem: Problem, ranks: Mapping[str, Sequence[int]]) -> dict[str, list[Effect]]:
    """Effects of each target alone, at its ranks.

    Raises:
        PlanError: an effect that is not finite.
    """
    effects = problem.measured().single(ranks)
    for path, found in effects.items():
        if not np.isfinite(found).all():
            raise PlanError(f"the divergence measured for '{path}' is not finite.", "run in float32 (--dtype float32)")
    return dict(effects)


def effect_of(problem: Problem, ranks: Mapping[str, Rank]) -> Effect:
    """Effect of a plan on the whole model.

    Raises:
        NonFiniteError: it is NaN or infinite.
    """
    effect = problem.measured().joint(ranks)
    if not np.isfinite(effect).all():
        raise NonFiniteError("the divergence of a plan is NaN or infinite.", "run in float32 (--dtype float32)")
    return effect


def anchored_curves(problem: Problem, anchors: Sequence[float]) -> list[Curve]:
    """KL(r) = T(r) * exp(linear interpolation of log(KL / T) between the anchors), constant beyond them.

    An anchor at which less than a millionth of a layer's energy is lost tells nothing: it moves to the last rank at
    which more is.
    """
    curves = []
    tails = {item.path: problem.tail(item) for item in problem.items}
    ranks = {i.path: _telling(tails[i.path], anchor_ranks(problem, i, anchors)) for i in problem.items}
    measured = measure(problem, ranks)
    for curve in problem.curves():
        tail, at, effects = tails[curve.path], ranks[curve.path], measured[curve.path]
        lost = np.maximum(tail[at], max(FLOOR * tail[0], np.finfo(float).tiny))
        ratio = np.log(np.maximum([e.kl for e in effects], LEAST)) - np.log(lost)
        factor = np.exp(np.interp(curve.ranks, at, ratio))
        curves.append(replace(curve, errors=_falling(curve.errors * factor, curve)))
    return curves


def _telling(tail: Floats, ranks: Sequence[int]) -> list[int]:
    """Ranks, those at which nothing is lost moved down to the last at which something is."""
    last = int((tail >= FLOOR * tail[0]).sum()) - 1
    return sorted({max(1, min(rank, last)) for rank in ranks})


def interpolated_curves(problem: Problem, fractions: Sequence[float]) -> list[Curve]:
    """Increase of the negative log-likelihood at every rank, from that measured at some.

    Between them it is interpolated linearly in the rank; below them it goes on along the line through the least two.
    """
    curves = []
    ranks = {item.path: anchor_ranks(problem, item, fractions) for item in problem.items}
    measured = measure(problem, ranks)
    base = effect_of(problem, {item.path: "dense" for item in problem.items}).nll
    for item, curve in zip(problem.items, problem.flat_curves(), strict=True):
        effects = measured[item.path]
        points = np.append(np.array(ranks[item.path], dtype=np.float64), min(item.shape))
        losses = np.append(isotonic(np.maximum([e.nll - base for e in effects], 0.0)), 0.0)
        slope = (losses[1] - losses[0]) / (points[1] - points[0])
        below = losses[0] + slope * (np.minimum(curve.ranks, points[0]) - points[0])
        errors = np.where(curve.ranks < points[0], below, np.interp(curve.ranks, points, losses))
        curves.append(replace(curve, errors=_falling(errors, curve)))
    return curves


def _falling(errors: Floats, curve: Curve) -> Floats:
    """Isotonic, and zero for the dense weight."""
    return isotonic(np.where(curve.ranks == DENSE, 0.0, errors))
