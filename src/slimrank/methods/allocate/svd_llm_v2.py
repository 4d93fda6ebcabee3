"""Keep more of the layers whose truncation loses more, within each role."""

from __future__ import annotations

from collections import defaultdict
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from slimrank.budget.curves import Floats
from slimrank.budget.problem import Allocation, Problem
from slimrank.budget.proportional import ROUNDING_UNITS, bounds, project, ranks_from_fractions
from slimrank.methods.allocate.spectrum import spectral_curves
from slimrank.methods.allocator import allocator

Variant = Annotated[
    Literal["relative", "literal"],
    Field(
        description="relative: shares by -log of the relative loss; literal: by 1 / log of the loss, as in the paper."
    ),
]
TINY = 1e-12


@allocator(
    id="svd_llm_v2",
    title="Compression distributed within each role by the loss at the uniform rank",
    paper="Wang et al., SVD-LLM V2, arXiv 2503.12340",
    needs=["spectra"],
)
def svd_llm_v2(problem: Problem, *, variant: Variant = "relative") -> Allocation:
    """Remove removed * s_l / mean(s) from each layer; the mean is over layers of the same role, weighed by size.

    Where ranks cannot store that, it is clipped, and the others of the role are shifted to its total.

    s = 1 / ln L with L = || W X - W'_r X || at the uniform rank is the paper's; it depends on how many tokens L was
    summed over, and changes sign at L = 1. s = -ln(L / || W X ||) does neither and falls with the loss as well.
    """
    losses = _losses(problem)
    low, high = bounds(problem)
    fractions = np.empty(len(problem.items))
    roles: defaultdict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(problem.items):
        roles[item.role].append(index)
    for members in roles.values():
        sizes = problem.sizes[members]
        kept = 1 - (1 - problem.keep_ratio) * _relative(_shares(losses[members], variant), sizes)
        fractions[members] = project(
            kept, sizes, low[members], high[members], problem.keep_ratio * sizes.sum(), ROUNDING_UNITS * problem.unit
        )
    return Allocation(ranks_from_fractions(problem, fractions), tuple(spectral_curves(problem)))


def _relative(shares: Floats, sizes: Floats) -> Floats:
    """Return shares over their mean, weighed by size; all equal if there is no such mean."""
    mean = float((shares * sizes).sum() / sizes.sum())
    return shares / mean if mean > TINY and np.isfinite(mean) else np.ones(len(shares))


def _shares(losses: Floats, variant: str) -> Floats:
    if variant == "relative":
        return -np.log(np.clip(losses[:, 1], TINY, 1 - TINY))
    logs = np.log(np.maximum(losses[:, 0], TINY))
    return 1 / np.where(np.abs(logs) > TINY, logs, TINY)


def _losses(problem: Problem) -> Floats:
    """Return the loss of each layer at its uniform rank, absolute and relative."""
    rows = []
    for item in problem.items:
        tail = problem.tail(item)
        share = problem.budget * item.bits // int(problem.sizes.sum())
        rank = min(problem.form.within(*item.shape, share, item.width), len(tail) - 1)
        loss = float(tail[rank]) ** 0.5
        rows.append((loss, loss / max(float(tail[0]) ** 0.5, TINY)))
    return np.array(rows)
