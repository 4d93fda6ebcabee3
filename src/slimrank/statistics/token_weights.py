"""Weights of token gradients: what the K-FAC statistics of KFAC-SVD trim or clip."""

from __future__ import annotations

import torch
from torch import Tensor

from slimrank.statistics.tokens import Places

NEGLIGIBLE = 1e-10  # a gradient of smaller norm is left as it is


def token_norms(vectors: Tensor) -> Tensor:
    """Return norms of token vectors (..., n), summed in float32 or better."""
    return torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.promote_types(vectors.dtype, torch.float32))


def token_scales(norms: Tensor, places: Places, trim: float, clip: tuple[float, float] | None) -> Tensor:
    """Return the factor of each token's gradient (rows), 0 for those left out.

    Args:
        norms: norms of the output gradients, a row for each token that reaches the layer.
        places: the positions of these tokens.
        trim: part of a window's tokens left out at either end.
        clip: norms are clipped to these multiples of the mean norm of their window's remaining rows.
    """
    cut = _left_out(places.lengths, trim)[places.window]
    middle = (places.position >= cut) & (places.position < places.lengths[places.window] - cut)
    scales = middle.to(norms)
    if clip is None:
        return scales
    sums, counts = (
        norms.new_zeros(len(places.lengths)).index_add(0, places.window, x) for x in (norms * scales, scales)
    )
    mean = (sums / counts.clamp(min=1))[places.window]
    held = torch.minimum(torch.maximum(norms, clip[0] * mean), clip[1] * mean) / norms.clamp(min=NEGLIGIBLE)
    return scales * torch.where(norms < NEGLIGIBLE, 1, held)


def scales_anywhere(norms: Tensor, lengths: Tensor, trim: float) -> Tensor:
    """Return factors for tokens at unknown positions in windows of these lengths; they sum as if trimmed."""
    kept = lengths - 2 * _left_out(lengths, trim)
    return torch.full_like(norms, (float(kept.sum()) / max(1.0, float(lengths.sum()))) ** 0.5)


def _left_out(lengths: Tensor, trim: float) -> Tensor:
    return (lengths.cpu().double() * trim).long().to(lengths.device)  # on the CPU: mps has no float64
