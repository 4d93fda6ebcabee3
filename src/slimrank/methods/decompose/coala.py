"""COALA: context-aware low-rank approximation with a regulariser."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from slimrank.layers.forms import PAIR
from slimrank.linalg.forms import Form, Metric
from slimrank.linalg.lowrank import Spectrum, solve
from slimrank.methods.decomposer import decomposer
from slimrank.statistics.layer_statistics import LayerStatistics

Mu = Annotated[
    Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["adaptive"],
    Field(description="Weight of the plain error, in units of the mean input energy; or adaptive."),
]
Mu0 = Annotated[float, Field(gt=0, allow_inf_nan=False, description="Strength of the adaptive weight.")]


@decomposer(
    id="coala",
    title="COALA: the least change of the output, plus that of the weight",
    paper="Parkina and Rakhuba, COALA, arXiv 2507.07580",
    needs={"column", "rank"},
    solves="twice",
    cost="two eigen-decompositions per weight where mu is adaptive, one elsewhere",
)
def coala(weight: Tensor, statistics: LayerStatistics, *, mu: Mu = "adaptive", mu0: Mu0 = 1.0) -> Spectrum:
    """Minimise || (W - W') X ||_F^2 + mu || W - W' ||_F^2.

    Adaptive: mu = mu0 || (W - W_0) X ||^2 / || W - W_0 ||^2, W_0 the solution for mu = 0 at the planned rank, so that
    both terms weigh alike there.
    """
    column = statistics.column
    if mu != "adaptive":
        return solve(weight, Metric(column=column.with_ridge(mu)))
    first = solve(weight, Metric(column=column))
    rank = min(statistics.rank or max(1, PAIR.largest_rank(*weight.shape)), first.full_rank)
    a, b = first.factors(weight, rank)
    change = float((weight.to(b) - b @ a).square().sum())
    absolute = mu0 * first.tail(rank) / change if change > 0 else 0.0
    return solve(weight, Metric(column=_ridged(column, absolute)))


def _ridged(column: Form, absolute: float) -> Form:
    return column.with_ridge(absolute / column.average) if column.average > 0 else column
