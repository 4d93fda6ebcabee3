"""SVD-LLM: truncation-aware whitening."""

from __future__ import annotations

from torch import Tensor

from slimrank.linalg.forms import Metric
from slimrank.linalg.lowrank import Spectrum, solve
from slimrank.methods.decomposer import decomposer
from slimrank.statistics.layer_statistics import LayerStatistics


@decomposer(
    id="svd_llm",
    title="SVD-LLM: the least change of the layer's output on calibration text",
    paper="Wang et al., SVD-LLM, arXiv 2403.07378",
    needs={"column"},
)
def svd_llm(weight: Tensor, statistics: LayerStatistics) -> Spectrum:
    """Minimise || (W - W') X ||_F over the calibration tokens X.

    The reference code inverts the Cholesky factor of X X^T and patches it when that fails; this
    reaches the same optimum without any inverse.
    """
    return solve(weight, Metric(column=statistics.column))
