"""SVD-LLM V2: the same optimum as SVD-LLM by way of two SVDs."""

from __future__ import annotations

from torch import Tensor

from slimrank.linalg.forms import Metric
from slimrank.linalg.lowrank import Spectrum, solve
from slimrank.methods.decomposer import decomposer
from slimrank.statistics.layer_statistics import LayerStatistics


@decomposer(
    id="svd_llm_v2",
    title="SVD-LLM V2: svd_llm with the eigen-root of the gram instead of its Cholesky factor",
    paper="Wang et al., SVD-LLM V2, arXiv 2503.12340",
    needs={"column"},
    cost="two eigen-decompositions per tall weight, one per other",
)
def svd_llm_v2(weight: Tensor, statistics: LayerStatistics) -> Spectrum:
    """Minimise || (W - W') X ||_F, as svd_llm does, with the root Q Lambda^(1/2) of X X^T (Theorem 3.1).

    The result does not depend on the root, so it is that of svd_llm. What V2 adds is its allocation of ranks.
    """
    return solve(weight, Metric(column=statistics.column), root="eigen")
