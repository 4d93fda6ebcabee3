"""GFWSVD: SVD in the nearest Kronecker product to the Fisher information."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from slimrank.decompose.registry import decomposer
from slimrank.linalg.forms import Form, Metric
from slimrank.linalg.lowrank import Spectrum, solve
from slimrank.statistics.layer import LayerStatistics
from slimrank.statistics.sums import SampleGradients

Iterations = Annotated[int, Field(ge=1, description="Rounds of power iteration for the Kronecker factors.")]
Shrink = Annotated[float, Field(ge=0, le=1, description="Shrinkage of both factors towards the identity.")]


@decomposer(
    id="gfwsvd",
    title="GFWSVD: the least change of the loss, by the nearest Kronecker product to the Fisher information",
    paper="Chekalina et al., Generalized Fisher-Weighted SVD, arXiv 2505.17974",
    needs={"gradients"},
    cost="gradients of all samples of a block in memory; power iteration over them",
)
def gfwsvd(
    weight: Tensor, statistics: LayerStatistics, *, iterations: Iterations = 3, shrink: Shrink = 0.1
) -> Spectrum:
    """Minimise tr(E^T G E C), G (x) C the Kronecker product nearest to (1/k) sum_i vec(G_i) vec(G_i)^T.

    G_i are the weight gradients of single samples.
    """
    if statistics.samples is None or len(statistics.samples) == 0:
        return solve(weight, Metric.of(torch.zeros(weight.shape[0]), torch.zeros(weight.shape[1])))
    row, column, strength = kronecker_factors(statistics.samples, weight, iterations)
    return solve(weight, Metric(Form(row).shrunk(shrink), Form(column).shrunk(shrink))).scaled(strength)


def kronecker_factors(samples: SampleGradients, like: Tensor, iterations: int) -> tuple[Tensor, Tensor, float]:
    """Row (m x m) and column (n x n) factor of the nearest Kronecker product, float64, each of unit norm; and its norm.

    Power iteration on the rearranged Fisher matrix, B <- I, A <- sum G_i B G_i^T, B <- sum G_i^T A G_i. Both maps keep
    matrices positive semidefinite, so that the factors have the right sign by themselves; singular vectors as a Lanczos
    solver gives them may both be negative.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    column = torch.eye(like.shape[1], device=like.device, dtype=dtype)
    for _ in range(iterations):
        row = _unit(samples.row(column))
        pulled = samples.column(row)
        column = _unit(pulled)
    return row.double(), column.double(), float(pulled.norm())


def _unit(matrix: Tensor) -> Tensor:
    norm = matrix.norm()
    symmetric = (matrix + matrix.t()) / 2
    return symmetric / norm if float(norm) > 0 else symmetric
