"""FWSVD: Fisher-weighted SVD."""

from __future__ import annotations

import torch
from torch import Tensor

from slimrank.linalg.forms import Form, Metric
from slimrank.linalg.lowrank import Spectrum, solve
from slimrank.methods.decomposer import decomposer
from slimrank.statistics.layer_statistics import LayerStatistics


@decomposer(
    id="fwsvd",
    title="FWSVD: input channels weighed by the Fisher information of their weights",
    paper="Hsu et al., Language model compression with weighted low-rank factorization, arXiv 2207.00112",
    needs={"weight_squares"},
)
def fwsvd(weight: Tensor, statistics: LayerStatistics) -> Spectrum:
    """Minimise sum_j I_j || column j of W - W' ||^2, I_j the squared gradients of column j summed over windows.

    The true element-wise weighting has no closed form; the sum over outputs makes it a diagonal metric.
    Spectra hold it over the number of outputs, which makes the sum a mean over outputs.
    """
    information = statistics.weight_squares
    column = Form(torch.zeros(weight.shape[1]) if information is None else information)
    return solve(weight, Metric(column=column)).scaled(1 / weight.shape[0])
