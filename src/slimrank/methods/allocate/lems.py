"""Measured divergence of each target alone, times the shape of its spectrum, times a bias for depth."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from slimrank.budget.curves import Curve, Floats
from slimrank.budget.measured_curves import anchored_curves, effect_of
from slimrank.budget.problem import Allocation, Problem
from slimrank.methods.allocator import allocator
from slimrank.methods.solver_options import least_error

Anchors = Annotated[
    tuple[Annotated[float, Field(gt=0, lt=1)], ...],
    Field(min_length=1, max_length=3, description="Where divergence is measured, as fractions of the largest rank."),
]
Alpha = Annotated[float, Field(ge=0, le=10, description="How fast the bias falls with depth; 0 is a straight line.")]
Gamma = Annotated[float, Field(ge=0, le=1e6, description="Bias of the first block over the last; 0 is none.")]
Search = Annotated[bool, Field(description="Measure plans of several alphas and gammas, gamma = 0 too; keep the best.")]
GRID = (0.0, 1.0, 2.5), (0.0, 1.5, 5.0)  # of alpha, of gamma


def measuring_passes(options: Mapping[str, Any], layers: int, batches: int) -> float:
    """Count half a pass for each layer and anchor, and one for each plan that is tried."""
    return 0.5 * layers * len(options["anchors"]) + 7 * options["search"]


@allocator(
    id="lems",
    title="Least sum of measured divergences, extended to all ranks by the spectra",
    paper="LEMS; reference code lems-svd",
    needs=["spectra", "divergence"],
    passes=measuring_passes,
    solves=True,
    joint=True,
)
def lems(
    problem: Problem,
    *,
    anchors: Anchors = (0.1,),
    alpha: Alpha = 0.0,
    gamma: Gamma = 0.0,
    search: Search = False,
    **solving: Any,
) -> Allocation:
    """Minimise the sum of e_l(r) = KL_l(r0) T_l(r) / T_l(r0) * m_b, r0 the anchor, m_b the depth bias `harmonicv2`.

    Between several anchors log(KL / T) is interpolated linearly in the rank.
    """
    curves = anchored_curves(problem, anchors)
    return biased(problem, curves, alpha, gamma, search, lambda c: least_error(problem, c, solving))


def biased(
    problem: Problem,
    curves: Sequence[Curve],
    alpha: float,
    gamma: float,
    search: bool,
    solve: Any,
) -> Allocation:
    """Return the allocation of curves times the depth bias, or the one of least measured divergence over the grid.

    It returns the curves without the bias: divergences.
    """
    settings = [(alpha, gamma)]
    if search:
        settings = sorted({(0.0 if g == 0 else a, g) for a, g in itertools.product(*GRID)} | set(settings))
    blocks = {item.path: item.block for item in problem.items}
    found: list[tuple[float, int, Allocation]] = []
    for index, (a, g) in enumerate(settings):
        bias = depth_bias(max(blocks.values()) + 1, a, g)
        allocation = solve([curve.scaled(float(bias[blocks[curve.path]])) for curve in curves])
        effect = effect_of(problem, allocation.ranks).kl if search else 0.0
        found.append((effect, index, allocation))
    effect, index, best = min(found, key=lambda item: item[:2])
    a, g = settings[index]
    note = f"alpha {a:g}, gamma {g:g} of {len(settings)} settings, divergence {effect:.4f}"
    notes = (*best.notes, note) if search else best.notes
    return replace(best, curves=tuple(curves), divergence=True, notes=notes)


def depth_bias(blocks: int, alpha: float, gamma: float) -> Floats:
    """Return m_b of each block: 1 + gamma in the first, 1 in the last; LEMS' `harmonicv2`."""
    terms = np.arange(1, blocks + 1, dtype=np.float64) ** -alpha
    sums = np.cumsum(terms[::-1])[::-1]
    span = max(float(sums[0] - sums[-1]), 1e-12)
    return 1 + gamma * (sums - sums[-1]) / span
