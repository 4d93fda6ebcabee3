"""KFAC-SVD: whitening of both sides by the Kronecker factors of the Fisher information."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from slimrank.linalg.forms import Metric
from slimrank.linalg.lowrank import Spectrum, solve
from slimrank.methods.decomposer import decomposer
from slimrank.statistics.layer_statistics import LayerStatistics

RowShrink = Annotated[float, Field(ge=0, le=1, description="Shrinkage of the gradients' gram.")]
ColumnShrink = Annotated[float, Field(ge=0, le=1, description="Shrinkage of the inputs' gram.")]
ShrinkTarget = Annotated[
    Literal["diagonal", "identity"],
    Field(description="Shrink a gram towards its own diagonal, or (as LEMS does) towards a multiple of the identity."),
]


@decomposer(
    id="kfac_svd",
    title="KFAC-SVD: the least change of the loss, as K-FAC sees it",
    paper="LEMS / KFAC-SVD (lems-svd/lems); Martens and Grosse, K-FAC, arXiv 1503.05671",
    needs={"column", "row"},
)
def kfac_svd(
    weight: Tensor,
    statistics: LayerStatistics,
    *,
    row_shrink: RowShrink = 0.1,
    column_shrink: ColumnShrink = 0.03,
    shrink_target: ShrinkTarget = "diagonal",
) -> Spectrum:
    """Minimise tr(E^T G E C), E = W - W': sum over pairs of tokens (s, t) of (g_s^T E x_t)^2.

    C = sum x x^T over inputs, G = sum g g^T over output gradients of the next-token loss, each shrunk towards
    `shrink_target`. Spectra hold it over the number of tokens, so that it estimates the sum over tokens of
    (g_t^T E x_t)^2 also for layers (experts) that see only some of them.
    """
    row = statistics.row.shrunk(row_shrink, shrink_target)
    column = statistics.column.shrunk(column_shrink, shrink_target)
    return solve(weight, Metric(row, column)).scaled(1 / max(1, statistics.tokens))
