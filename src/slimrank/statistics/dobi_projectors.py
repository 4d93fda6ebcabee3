"""Truncated outputs and the projectors on them: the statistics of Dobi-SVD (arXiv 2502.02723)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimrank.layers.dense import weight_of
from slimrank.linalg.forms import Metric
from slimrank.linalg.lowrank import solve
from slimrank.statistics.layer_statistics import LayerStatistics
from slimrank.statistics.precision import widened


def truncate_output(mine: LayerStatistics, module: nn.Module, gram: Tensor, output: Tensor) -> Tensor:
    """Replace a batch's outputs by their best approximation at the planned rank.

    Adds the projector on them to the layer's statistics. The leading left singular vectors of Y = W X are those of W in
    the metric X X^T. A batch of T < min(m, n) tokens is truncated at ceil(rank T / min(m, n)).

    Args:
        mine: statistics of the layer, with a rank.
        module: the layer.
        gram: X X^T of this batch (n x n).
        output: (..., m), bias included.
    """
    assert mine.rank is not None
    weight = weight_of(module).to(gram.device)
    full, tokens = min(mine.shape), output[..., 0].numel()
    if tokens == 0:
        return output
    rank = min(full, mine.rank) if tokens >= full else max(1, -(-mine.rank * tokens // full))
    leading = solve(weight, Metric.of(column=gram), rank=rank)
    mine.notes = tuple(dict.fromkeys((*mine.notes, *leading.notes)))
    _, u = leading.factors(weight, rank)
    coordinates = u if mine.shape[0] <= mine.shape[1] else column_basis(weight).t() @ u
    projector = coordinates @ coordinates.t()
    mine.projector = projector if mine.projector is None else mine.projector + projector
    bias = getattr(module, "bias", None)
    wide = widened(output)
    narrow = u.to(wide)
    centred = wide if bias is None else wide - bias
    truncated = centred @ narrow @ narrow.t()
    return (truncated if bias is None else truncated + bias).to(output)


def column_basis(weight: Tensor) -> Tensor:
    """Return an orthonormal basis (m x n, float64) of the columns of a tall weight (m x n, m > n)."""
    return torch.linalg.qr(weight.to(torch.float64)).Q
