"""Plain truncated SVD: no data."""

from __future__ import annotations

from torch import Tensor

from slimrank.linalg.lowrank import Spectrum, solve
from slimrank.methods.decomposer import decomposer
from slimrank.statistics.layer_statistics import LayerStatistics


@decomposer(
    id="svd",
    title="Plain truncated SVD: the least change of the weight itself",
    paper="Eckart and Young, The approximation of one matrix by another of lower rank, 1936",
)
def svd(weight: Tensor, statistics: LayerStatistics) -> Spectrum:
    """Minimise || W - W' ||_F."""
    return solve(weight)
