"""DRONE: data-aware low-rank compression."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from slimrank.linalg.forms import Form, Metric
from slimrank.linalg.lowrank import Spectrum, solve
from slimrank.methods.decomposer import decomposer
from slimrank.statistics.layer_statistics import LayerStatistics

MinNorm = Annotated[
    bool, Field(description="W' is zero on inputs that the calibration text never shows, as in the paper.")
]


@decomposer(
    id="drone",
    title="DRONE: the least change of the output, also where the inputs span a subspace only",
    paper="Chen et al., DRONE: Data-aware Low-rank Compression for Large NLP Models, NeurIPS 2021",
    needs={"gram"},
)
def drone(weight: Tensor, statistics: LayerStatistics, *, min_norm: MinNorm = False) -> Spectrum:
    """Minimise || (W - W') X ||_F, X of any rank.

    With `min_norm`, W' is the solution of least norm: zero on inputs outside the span of X. Without it W' keeps the
    action of W there, which does better on new text; where X has full rank both are svd_llm.
    """
    metric = Metric(column=Form(statistics.gram))
    return solve(weight, metric, side="in", root="pseudo") if min_norm else solve(weight, metric)
