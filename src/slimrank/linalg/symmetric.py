"""Products of symmetric matrices without duplicate work.

torch has no public SYRK; splitting the columns into panels and multiplying only the upper block triangle
does (p + 1) / 2p of the work of a full product.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PANELS = 6
_SMALLEST_PANEL = 64


def _panels(n: int) -> range:
    width = max(_SMALLEST_PANEL, -(-n // _PANELS))
    return range(0, n, width)


def upper_gram(rows: Tensor, out: Tensor) -> Tensor:
    """Write rows^T rows (n x n, from tokens x n) into the block upper triangle of `out`; the rest is left alone."""
    starts = _panels(rows.shape[1])
    for i in starts:
        end = i + starts.step
        out[i:end, i:].addmm_(rows[:, i:end].t(), rows[:, i:], beta=0)
    return out


def mirror_upper(matrix: Tensor) -> Tensor:
    """Fill the block lower triangle of a matrix in place from what `upper_gram` has written above it."""
    starts = _panels(len(matrix))
    for i in starts:
        end = i + starts.step
        matrix[end:, i:end] = matrix[i:end, end:].t()
        corner = matrix[i:end, i:end]
        corner.copy_(torch.triu(corner) + torch.triu(corner, 1).t())
    return matrix


def gram(rows: Tensor) -> Tensor:
    """Return rows^T rows (n x n, from tokens x n), exactly symmetric."""
    n = rows.shape[1]
    return mirror_upper(upper_gram(rows, rows.new_empty(n, n)))


def congruence(w: Tensor, c: Tensor) -> Tensor:
    """Return w c w^T (m x m) for w (m x n) and a symmetric c (n x n), exactly symmetric.

    With c = t + t^T, t upper triangular: w c w^T = p + p^T, p = (w t) w^T; w t skips the zero panels of t.
    """
    wt = torch.empty_like(w)
    starts = _panels(len(c))
    for i in starts:
        end = i + starts.step
        corner = torch.triu(c[i:end, i:end])
        corner.diagonal().mul_(0.5)
        torch.mm(w[:, i:end], corner, out=wt[:, i:end])
        if i:
            wt[:, i:end].addmm_(w[:, :i], c[:i, i:end])
    p = wt @ w.t()
    return p + p.t()
