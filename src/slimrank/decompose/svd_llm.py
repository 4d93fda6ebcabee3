"""SVD-LLM: truncation-aware whitening."""

from __future__ import annotations

from torch import Tensor

from slimrank.decompose.registry import decomposer
from slimrank.linalg.lowrank import Spectrum, solve


@decomposer(
    id="svd_llm",
    title="SVD-LLM: the least change of the layer's output on calibration text",
    paper="Wang et al., SVD-LLM, arXiv 2403.07378",
    needs={"gram"},
)
def svd_llm(weight: Tensor, gram: Tensor | None = None) -> Spectrum:
    """Minimise || (W - W') X ||_F, with gram = X X^T over the calibration tokens.

    The reference code inverts the Cholesky factor of the Gram and patches it when that fails; the same optimum
    is reached here without any inverse.
    """
    return solve(weight, gram)
