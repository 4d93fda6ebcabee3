"""KFAC-SVD: whitening of both sides by the Kronecker factors of the Fisher information."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from slimrank.decompose.registry import decomposer
from slimrank.linalg.forms import Metric
from slimrank.linalg.lowrank import Spectrum, solve
from slimrank.statistics.layer import LayerStatistics

RowShrink = Annotated[float, Field(ge=0, le=1, description="Shrinkage of the gradients' gram towards the identity.")]
ColumnShrink = Annotated[float, Field(ge=0, le=1, description="Shrinkage of the inputs' gram towards the identity.")]


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
    row_shrink: RowShrink = 0.3,
    column_shrink: ColumnShrink = 0.1,
) -> Spectrum:
    """Minimise tr(E^T G E C), E = W - W': sum over pairs of tokens (s, t) of (g_s^T E x_t)^2.

    C = sum x x^T over inputs, G = sum g g^T over output gradients of the next-token loss, each shrunk towards a
    multiple of the identity. Spectra hold it over the number of tokens, so that it estimates the sum over tokens of
    (g_t^T E x_t)^2 also for layers (experts) that see only some of them.
    """
    row, column = statistics.row.shrunk(row_shrink), statistics.column.shrunk(column_shrink)
    return solve(weight, Metric(row, column)).scaled(1 / max(1, statistics.tokens))
