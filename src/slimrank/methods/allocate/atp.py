"""An arithmetic progression of keep ratios over the depth."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from slimrank.budget.measured_curves import effect_of
from slimrank.budget.problem import Allocation, Problem
from slimrank.budget.proportional import ranks_from_fractions
from slimrank.methods.allocator import allocator

Spread = Annotated[
    float,
    Field(ge=0, le=1, description="Difference between first and last block, as a fraction of the largest possible."),
]
Trials = Annotated[int, Field(ge=1, description="Spreads from 0 to `spread` that are measured; 1 takes it as it is.")]


@allocator(
    id="atp",
    title="Keep ratios that fall with depth in an arithmetic progression",
    paper="ATP, determining layer-wise sparsity by an arithmetic progression",
    needs=["divergence"],
    passes=lambda options, layers, batches: float(options["trials"]),
)
def atp(problem: Problem, *, spread: Spread = 1.0, trials: Trials = 11) -> Allocation:
    """Give block b the fraction keep + beta (1/2 - b / (blocks - 1)), beta of least divergence among `trials`.

    The largest beta is 2 min(keep, 1 - keep); 0 is uniform, and is always among the trials.
    """
    keep = problem.keep_ratio
    blocks = np.array([item.block for item in problem.items], dtype=np.float64)
    depth = (blocks - blocks.min()) / max(1.0, float(np.ptp(blocks)))
    largest = spread * 2 * min(keep, 1 - keep)
    betas = np.linspace(0, largest, trials) if trials > 1 else np.array([largest])
    plans = [ranks_from_fractions(problem, keep + beta * (0.5 - depth)) for beta in betas]
    if len(plans) == 1:
        return Allocation(plans[0])
    effects = [effect_of(problem, plan).kl for plan in plans]
    best = int(np.argmin(effects))
    return Allocation(plans[best], notes=(f"spread {betas[best]:.4f} of {trials}, divergence {effects[best]:.4f}",))
