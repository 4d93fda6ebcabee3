"""A low-rank product B A written in some of its own rows or columns: r (m + n) - r^2 numbers, without loss.

    out:  W' = P [S; T S]    S = r rows of W' (r x n),      T ((m - r) x r): the other rows as combinations of them
    in:   W' = [S, S T] P    S = r columns of W' (m x r),   T (r x (n - r)): the other columns as combinations of them

An interpolative decomposition, with P a permutation: PiFa (arXiv 2501.19090), PivGa (arXiv 2512.03062). The choice of
rows is free and decides how well it rounds. They are chosen so that no entry of T is large, as in strong rank-revealing
factorisations (Gu and Eisenstat, 1996; "maxvol", Goreinov et al., 2010).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LARGEST = 2.0  # |T_ij|; every exchange multiplies the volume of the pivots by more than this, so there are few


@dataclass(frozen=True)
class Pivoted:
    """A rank-r matrix (m x n) in r of its own rows or columns.

    Attributes:
        side: "out" for rows, "in" for columns.
        skeleton: S, those rows (r x n) or columns (m x r), float64.
        interpolation: T, the others as combinations of them, (m - r) x r or r x (n - r), float64.
        order: int32. "out": [pivots, rest] indexed by it is in natural order; "in": natural order indexed by it is
            [pivots, rest]. Pivots and rest are each ascending.
    """

    side: Literal["out", "in"]
    skeleton: Tensor
    interpolation: Tensor
    order: Tensor


def pivoted(A: Tensor, B: Tensor, side: Literal["out", "in"] | None = None) -> Pivoted:
    """Express the product B A in r of its own rows or columns, computed in float64 on the device of A.

    A and B may be scaled badly or lack rank: pivots are chosen in an orthonormal basis of the span of B (or A).

    Args:
        A: rank x n.
        B: m x rank.
        side: rows ("out") or columns ("in"); by default those of which there are fewer.

    Raises:
        ValueError: a rank above min(m, n).
    """
    rank, n = A.shape
    m = B.shape[0]
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank {rank} is outside 1..{min(m, n)}")
    a, b = A.to(torch.float64), B.to(torch.float64)
    if (side or ("out" if m <= n else "in")) == "out":
        pivots, rest, t = _interpolation(b)
        return Pivoted("out", b[pivots] @ a, t, torch.cat([pivots, rest]).argsort().to(torch.int32))
    pivots, rest, t = _interpolation(a.t())
    return Pivoted("in", b @ a[:, pivots], t.t().contiguous(), torch.cat([pivots, rest]).to(torch.int32))


def _interpolation(tall: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return pivot rows of a matrix (m x r), the other rows, and T ((m - r) x r) with tall[rest] = T tall[pivots]."""
    q = torch.linalg.qr(tall).Q
    pivots, rest = (rows.sort().values for rows in _exchanged(*_leading_rows(q)))
    # Once more from q: the updates on the way have piled up rounding errors.
    return pivots, rest, torch.linalg.solve(q[pivots], q[rest], left=False)


def _leading_rows(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pivot rows of elimination with row exchanges, the others, and the others in terms of the pivots."""
    m, r = q.shape
    lu, exchanges = torch.linalg.lu_factor(q)
    rows = list(range(m))
    for i, j in enumerate(exchanges.tolist()):
        rows[i], rows[j - 1] = rows[j - 1], rows[i]
    order = torch.tensor(rows, device=q.device)
    t = torch.linalg.solve_triangular(lu[:r], lu[r:], upper=False, left=False, unitriangular=True)
    return order[:r], order[r:], t


def _exchanged(pivots: Tensor, rest: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Exchange the worst pair of pivot and other row until no entry of T is above `LARGEST`; return both lists."""
    while t.numel():
        i, j = divmod(int(t.abs().argmax()), t.shape[1])
        entry = t[i, j].clone()
        if not entry.abs() > LARGEST:  # NaN ends it, too
            break
        pivots[j], rest[i] = rest[i].clone(), pivots[j].clone()
        change = t[i] / entry
        change[j] -= 1 / entry
        t[i] = 0
        t[i, j] = 1
        t -= torch.outer(t[:, j], change)
    return pivots, rest
