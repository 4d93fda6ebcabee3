"""Which token gradients count, and how much: what the K-FAC statistics of KFAC-SVD leave out or hold down."""

from __future__ import annotations

import torch
from torch import Tensor

NEGLIGIBLE = 1e-10  # a gradient of smaller norm is left as it is


def token_scales(g: Tensor, trim: float, clip: tuple[float, float] | None) -> Tensor:
    """What to multiply each token's gradient with (windows x tokens), 0 for those left out.

    Args:
        g: output gradients (windows x tokens x m).
        trim: part of the tokens left out at either end of a window.
        clip: norms are held between these multiples of the mean norm of their window's tokens that are left.
    """
    tokens = g.shape[1]
    cut = int(tokens * trim)
    scales = torch.zeros(g.shape[:2], dtype=torch.float32, device=g.device)
    middle = slice(cut, tokens - cut)
    scales[:, middle] = 1
    if clip is not None:
        norms = g[:, middle].float().norm(dim=-1)
        mean = norms.mean(dim=1, keepdim=True)
        held = torch.minimum(torch.maximum(norms, clip[0] * mean), clip[1] * mean)
        scales[:, middle] = torch.where(norms < NEGLIGIBLE, 1, held / norms.clamp(min=NEGLIGIBLE))
    return scales
