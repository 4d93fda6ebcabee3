"""Which token gradients count, and how much: what the K-FAC statistics of KFAC-SVD leave out or hold down."""

from __future__ import annotations

import torch
from torch import Tensor

NEGLIGIBLE = 1e-10  # a gradient of smaller norm is left as it is


def token_norms(vectors: Tensor) -> Tensor:
    """Norms of token vectors (..., n), summed in float32 or better."""
    return torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.promote_types(vectors.dtype, torch.float32))


def token_scales(norms: Tensor, trim: float, clip: tuple[float, float] | None) -> Tensor:
    """What to multiply each token's gradient with (windows x tokens), 0 for those left out.

    Args:
        norms: norms of the output gradients (windows x tokens).
        trim: part of the tokens left out at either end of a window.
        clip: norms are held between these multiples of the mean norm of their window's tokens that are left.
    """
    tokens = norms.shape[1]
    cut = int(tokens * trim)
    scales = torch.zeros_like(norms)
    middle = norms[:, cut : tokens - cut]
    held = torch.ones_like(middle)
    if clip is not None:
        mean = middle.mean(dim=1, keepdim=True)
        clipped = torch.minimum(torch.maximum(middle, clip[0] * mean), clip[1] * mean)
        held = torch.where(middle < NEGLIGIBLE, 1, clipped / middle.clamp(min=NEGLIGIBLE))
    scales[:, cut : tokens - cut] = held
    return scales
