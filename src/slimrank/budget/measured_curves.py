"""Curves from measurements at a few ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from slimrank.budget.curves import DENSE, Curve, Floats, isotonic
from slimrank.budget.problem import Effect, Item, Problem
from slimrank.budget.ranks import Rank
from slimrank.errors import NonFiniteError, PlanError

MIN_NATS = 1e-9  # nats; what is less is rounding
MIN_ENERGY_SHARE = 1e-6  # of a layer's energy; what is less is rounding


def anchor_ranks(problem: Problem, item: Item, fractions: Sequence[float]) -> list[int]:
    """Return the ranks at these fractions of the largest that stores less than the dense weight; each once."""
    top = problem.form.largest_rank(*item.shape, item.width)
    return sorted({max(1, min(round(f * top), min(item.shape) - 1)) for f in fractions})


def measure(problem: Problem, ranks: Mapping[str, Sequence[int]]) -> dict[str, list[Effect]]:
    """Measure the effects of each target alone at its ranks, if it has a choice of ranks.

    Raises:
        PlanError: an effect that is not finite.
    """
    free = {item.path for item, (found, _) in zip(problem.items, problem.choices, strict=True) if len(found) > 1}
    effects = problem.measured().single({path: some for path, some in ranks.items() if path in free})
    for path, found in effects.items():
        if not np.isfinite(found).all():
            raise PlanError(f"the divergence measured for '{path}' is not finite.", "run in float32 (--dtype float32)")
    return dict(effects)


def effect_of(problem: Problem, ranks: Mapping[str, Rank]) -> Effect:
    """Measure the effect of a plan on the whole model.

    Raises:
        NonFiniteError: it is NaN or infinite.
    """
    effect = problem.measured().joint(ranks)
    if not np.isfinite(effect).all():
        raise NonFiniteError("the divergence of a plan is NaN or infinite.", "run in float32 (--dtype float32)")
    return effect


def anchored_curves(problem: Problem, anchors: Sequence[float]) -> list[Curve]:
    """Compute KL(r) = T(r) * exp(linear interpolation of log(KL / T) between the anchors), constant beyond them.

    An anchor at which less than a millionth of a layer's energy is lost tells nothing: it moves to the last rank at
    which more is. Where there is no choice of ranks nothing is measured, and no error counted.
    """
    tails = {item.path: problem.tail(item) for item in problem.items}
    ranks = {i.path: _telling(tails[i.path], anchor_ranks(problem, i, anchors)) for i in problem.items}
    measured = measure(problem, ranks)
    return [
        _anchored(curve, tails[curve.path], ranks[curve.path], measured[curve.path])
        if curve.path in measured
        else curve.scaled(0.0)
        for curve in problem.curves()
    ]


def _anchored(curve: Curve, tail: Floats, ranks: Sequence[int], effects: Sequence[Effect]) -> Curve:
    lost = np.maximum(tail[ranks], max(MIN_ENERGY_SHARE * tail[0], np.finfo(float).tiny))
    ratio = np.log(np.maximum([e.kl for e in effects], MIN_NATS)) - np.log(lost)
    factor = np.exp(np.interp(curve.ranks, ranks, ratio))
    return replace(curve, errors=_falling(curve.errors * factor, curve))


def _telling(tail: Floats, ranks: Sequence[int]) -> list[int]:
    """Move ranks at which nothing is lost down to the last rank at which something is."""
    last = int((tail >= MIN_ENERGY_SHARE * tail[0]).sum()) - 1
    return sorted({max(1, min(rank, last)) for rank in ranks})


def interpolated_curves(problem: Problem, fractions: Sequence[float]) -> list[Curve]:
    """Increase of the negative log-likelihood at every rank, from that measured at some.

    Between them it is interpolated linearly in the rank. Below the least nothing is known, and a layer whose loss did
    not rise there would be free: errors are above all that was measured, the largest of any layer to twice that.
    """
    ranks = {item.path: anchor_ranks(problem, item, fractions) for item in problem.items}
    measured = measure(problem, ranks)
    base = effect_of(problem, {item.path: "dense" for item in problem.items}).nll
    rises = {path: [effect.nll - base for effect in effects] for path, effects in measured.items()}
    worst = max([MIN_NATS, *(rise for some in rises.values() for rise in some)])
    return [
        _interpolated(curve, [*ranks[item.path], min(item.shape)], rises[item.path], worst)
        if item.path in rises
        else curve
        for item, curve in zip(problem.items, problem.flat_curves(), strict=True)
    ]


def _interpolated(curve: Curve, ranks: Sequence[int], rises: Sequence[float], worst: float) -> Curve:
    points = np.array(ranks, dtype=np.float64)
    losses = np.append(isotonic(np.maximum(rises, 0.0)), 0.0)
    below = worst * (2 - curve.ranks / points[0])
    errors = np.where(curve.ranks < points[0], below, np.interp(curve.ranks, points, losses))
    return replace(curve, errors=_falling(errors, curve))


def _falling(errors: Floats, curve: Curve) -> Floats:
    """Make errors isotonic, and zero for the dense weight."""
    return isotonic(np.where(curve.ranks == DENSE, 0.0, errors))
