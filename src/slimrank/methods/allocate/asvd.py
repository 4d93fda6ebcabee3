"""Sensitivity-based truncation: the same rise of the perplexity for every target, measured one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from slimrank.budget.curves import Curve, Integers
from slimrank.budget.measured_curves import effect_of, interpolated_curves
from slimrank.budget.minimax import least_maximum
from slimrank.budget.problem import Allocation, Problem
from slimrank.budget.proportional import ranks_of
from slimrank.methods.allocator import allocator

Fractions = Annotated[
    tuple[Annotated[float, Field(gt=0, lt=1)], ...],
    Field(min_length=1, description="Where each target is measured, as fractions of the largest rank."),
]
Rise = Annotated[
    float | None,
    Field(
        gt=1,
        description="Stop at the smallest size whose perplexity is at most this many times the original's, if that is "
        "within the budget; null spends the budget.",
    ),
]
BISECTION_STEPS = 11


@allocator(
    id="asvd",
    title="The least rise of the perplexity that no target alone exceeds",
    paper="Yuan et al., ASVD, arXiv 2312.05821 (STRS)",
    needs=["divergence"],
    passes=lambda options, layers, batches: (
        0.5 * layers * len(options["fractions"]) + 1 + (BISECTION_STEPS + 1 if options["max_rise"] else 0)
    ),
)
def asvd(
    problem: Problem, *, fractions: Fractions = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9), max_rise: Rise = None
) -> Allocation:
    """Search a threshold theta: each target takes its smallest rank whose rise of the loss is at most theta."""
    curves = interpolated_curves(problem, fractions)
    picks, notes = _threshold(problem, curves, max_rise)
    return Allocation(ranks_of(problem, picks), tuple(curves), notes=notes)


def _threshold(problem: Problem, curves: Sequence[Curve], max_rise: float | None) -> tuple[Integers, tuple[str, ...]]:
    counted, budget = problem.in_units(curves)
    picks = least_maximum(counted, budget)
    if max_rise is None:
        return picks, ()
    allowed = effect_of(problem, {item.path: "dense" for item in problem.items}).nll + np.log(max_rise)
    low, high = sum(int(c.costs[0]) for c in counted), budget
    if effect_of(problem, ranks_of(problem, picks)).nll > allowed:
        return picks, (f"the budget does not keep the perplexity within {max_rise:g} times the original's",)
    for _ in range(BISECTION_STEPS):
        middle = (low + high) // 2
        trial = least_maximum(counted, middle)
        if effect_of(problem, ranks_of(problem, trial)).nll <= allowed:
            picks, high = trial, middle
        else:
            low = middle
    return picks, ()
