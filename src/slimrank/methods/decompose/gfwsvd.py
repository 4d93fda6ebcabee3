"""GFWSVD: SVD in the nearest Kronecker product to the Fisher information."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from slimrank.linalg.forms import Form, Metric
from slimrank.linalg.lowrank import Spectrum, solve
from slimrank.methods.decompose.kfac_svd import ShrinkTarget
from slimrank.methods.decomposer import decomposer
from slimrank.statistics.accumulators import SampleGradients
from slimrank.statistics.layer_statistics import LayerStatistics

Iterations = Annotated[
    int,
    Field(ge=1, description="Maximum rounds of power iteration for the Kronecker factors; it ends when they converge."),
]
Shrink = Annotated[float, Field(ge=0, le=1, description="Shrinkage of both factors.")]

LEAST_ERROR = 1e-8  # of a factor of unit norm that has converged; 100 eps where that is more


class Nearest(NamedTuple):
    """The nearest Kronecker product.

    Attributes:
        row: m x m, float64, of unit norm.
        column: n x n, float64, of unit norm.
        norm: of the product.
        error: estimated distance of `column` from the limit of the rounds.
        converged: whether that is as small as rounding.
    """

    row: Tensor
    column: Tensor
    norm: float
    error: float
    converged: bool


@decomposer(
    id="gfwsvd",
    title="GFWSVD: the least change of the loss, by the nearest Kronecker product to the Fisher information",
    paper="Chekalina et al., Generalized Fisher-Weighted SVD, arXiv 2505.17974",
    needs={"gradients"},
    cost="gradients of all samples of a block in memory; power iteration over them",
)
def gfwsvd(
    weight: Tensor,
    statistics: LayerStatistics,
    *,
    iterations: Iterations = 100,
    shrink: Shrink = 0.1,
    shrink_target: ShrinkTarget = "diagonal",
) -> Spectrum:
    """Minimise tr(E^T G E C), G (x) C the Kronecker product nearest to (1/k) sum_i vec(G_i) vec(G_i)^T.

    G_i are the weight gradients of single samples.
    """
    if statistics.samples is None or len(statistics.samples) == 0:
        return solve(weight, Metric.of(torch.zeros(weight.shape[0]), torch.zeros(weight.shape[1])))
    nearest = kronecker_factors(statistics.samples, weight, iterations)
    forms = (Form(factor).shrunk(shrink, shrink_target) for factor in (nearest.row, nearest.column))
    found = solve(weight, Metric(*forms)).scaled(nearest.norm)
    if nearest.converged:
        return found
    note = f"the Kronecker factors are about {nearest.error:.1e} off after {iterations} rounds: raise iterations"
    return replace(found, notes=(*found.notes, note))


def kronecker_factors(samples: SampleGradients, like: Tensor, iterations: int) -> Nearest:
    """Find the nearest Kronecker product to the sum of vec(G_i) vec(G_i)^T.

    Power iteration on the rearranged Fisher matrix, B <- I, A <- sum G_i B G_i^T, B <- sum G_i^T A G_i. Both maps keep
    matrices positive semidefinite, so that the factors have the right sign by themselves; singular vectors as a Lanczos
    solver gives them may both be negative. Changes shrink by the same factor in each round, so that all later rounds
    together make change / (1 - factor).

    Args:
        samples: the G_i (m x n), at least one.
        like: a matrix m x n of the dtype (float32 or better) and on the device to compute in.
        iterations: maximum number of rounds.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    column = torch.eye(like.shape[1], device=like.device, dtype=dtype)
    least, change = max(LEAST_ERROR, 100 * torch.finfo(dtype).eps), math.inf
    for _ in range(iterations):
        row = _unit(samples.row(column))
        pulled = samples.column(row)
        before, column = column, _unit(pulled)
        earlier, change = change, float((column - before).norm())
        error = change / (1 - change / earlier) if change < earlier else math.inf
        if error <= least or change == 0:
            break
    return Nearest(row.double(), column.double(), float(pulled.norm()), error, error <= least)


def _unit(matrix: Tensor) -> Tensor:
    norm = matrix.norm()
    symmetric = (matrix + matrix.t()) / 2
    return symmetric / norm if float(norm) > 0 else symmetric
