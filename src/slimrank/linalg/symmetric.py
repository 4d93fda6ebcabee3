"""Symmetric matrices without doing the work twice.

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


def add_upper_gram(accumulator: Tensor, rows: Tensor) -> None:
    """Add rows^T rows (n x n, from tokens x n) to the upper block triangle of `accumulator`, in place."""
    n = rows.shape[1]
    starts = _panels(n)
    for i in starts:
        left = rows[:, i : i + starts.step]
        accumulator[i : i + starts.step, i:].addmm_(left.t(), rows[:, i:])


def mirror_upper(matrix: Tensor) -> Tensor:
    """The full symmetric matrix of which the upper triangle of `matrix` is given."""
    return torch.triu(matrix) + torch.triu(matrix, 1).t()


def gram(rows: Tensor) -> Tensor:
    """rows^T rows (n x n, from tokens x n), exactly symmetric."""
    upper = rows.new_zeros(rows.shape[1], rows.shape[1])
    add_upper_gram(upper, rows)
    return mirror_upper(upper)


def congruence(w: Tensor, c: Tensor) -> Tensor:
    """w c w^T (m x m) for w (m x n) and a symmetric c (n x n), exactly symmetric.

    With c = t + t^T, t upper triangular: w c w^T = p + p^T, p = (w t) w^T; w t skips the zero panels.
    """
    t = torch.triu(c)
    t.diagonal().mul_(0.5)
    wt = torch.empty_like(w)
    starts = _panels(c.shape[0])
    for i in starts:
        end = i + starts.step
        torch.mm(w[:, :end], t[:end, i:end], out=wt[:, i:end])
    p = wt @ w.t()
    return p + p.t()
