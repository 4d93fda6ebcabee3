"""Keep more of the blocks that change their input most."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from slimrank.budget.problem import Allocation, Problem
from slimrank.budget.proportional import ranks_from_fractions
from slimrank.errors import NonFiniteError
from slimrank.methods.allocator import allocator

Least = Annotated[
    float | None,
    Field(gt=0, le=1, description="Fraction kept by a block of no importance (mrr); null: keep_ratio - 0.1."),
]
Importance = Annotated[
    Literal["change", "similarity"],
    Field(description="change: 1 - cosine of a block's input and output; similarity: the cosine."),
]


@allocator(
    id="ada_cr",
    title="Keep ratios by block, in proportion to how much the block changes its input",
    paper="Li et al., AdaSVD, arXiv 2502.01403 (adaCR)",
    needs=["influence"],
    passes=lambda options, layers, batches: 1.0,
)
def ada_cr(problem: Problem, *, least: Least = None, importance: Importance = "change") -> Allocation:
    """Give block b the fraction least + I_b / mean(I) * (keep - least), clipped and shifted to the budget."""
    cosines = np.array(problem.measured().influence())
    if not np.isfinite(cosines).all():
        block = int(np.argmin(np.isfinite(cosines)))
        raise NonFiniteError(f"the influence of block {block} is NaN or infinite.", "run in float32 (--dtype float32)")
    blocks = np.array([item.block for item in problem.items])
    weight = (cosines if importance == "similarity" else np.maximum(1 - cosines, 0.0))[blocks]
    mean = float((weight * problem.sizes).sum() / problem.sizes.sum())
    notes: tuple[str, ...] = ()
    if least is not None and least > problem.keep_ratio:
        notes = (f"least {least:g} is more than all blocks keep together, {problem.keep_ratio:.3f}: uniform",)
    least = max(0.0, problem.keep_ratio - 0.1) if least is None else min(least, problem.keep_ratio)
    fractions = least + (weight / mean if mean > 0 else 1.0) * (problem.keep_ratio - least)
    return Allocation(ranks_from_fractions(problem, np.broadcast_to(fractions, blocks.shape)), notes=notes)
