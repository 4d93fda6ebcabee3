"""Dobi-SVD: one projector for the truncated outputs of all batches."""

from __future__ import annotations

from torch import Tensor

from slimrank.linalg.eigen import descending_eigen
from slimrank.linalg.lowrank import Spectrum, solve
from slimrank.methods.decomposer import decomposer
from slimrank.statistics.dobi_projectors import column_basis
from slimrank.statistics.layer_statistics import LayerStatistics


@decomposer(
    id="dobi_svd",
    title="Dobi-SVD: the projector nearest to those on each batch's leading outputs",
    paper="Wang et al., Dobi-SVD, arXiv 2502.02723",
    needs={"projectors", "rank"},
    solves="per batch",
    cost="one eigen-decomposition per weight and batch: the slowest",
)
def dobi_svd(weight: Tensor, statistics: LayerStatistics) -> Spectrum:
    """Maximise sum_b || U_b^T U ||_F^2, U_b the leading left singular vectors of batch b's outputs W X_b.

    Outputs are truncated at the planned rank while the statistics are gathered, so that each layer sees what the
    truncation before it has left. The squares of the `values` are the eigenvalues of sum_b U_b U_b^T: how many
    batches hold a direction, whatever its energy there.
    """
    if statistics.projector is None:
        return solve(weight)
    values, vectors, notes = descending_eigen(statistics.projector.to(weight.device))
    tall = weight.shape[0] > weight.shape[1]
    basis = column_basis(weight) @ vectors if tall else vectors
    return Spectrum(values.clamp(min=0).sqrt(), basis, "out", notes=(*statistics.notes, *notes))
