"""The one weighted low-rank solver.

    min over rank(W') <= r of || (W - W') R ||_F ,   C = R R^T        (W is m x n, C is n x n)

No Gram is ever inverted. Both routes give W' = U_r U_r^T W, U_r orthonormal (m x r):

* out-side (m <= n): U = eigenvectors of W C W^T (m x m);
* in-side  (m > n):  V = eigenvectors of R^T W^T W R (n x n), U_r = orth(W R V_r).

Forms F2 and F3 of the literature's closed forms (COALA, arXiv 2507.07580; SVD-LLM, arXiv 2403.07378 needs
R^-1 for the same result). Factors are nested: those of rank r are a prefix of those of rank r + 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from slimrank.linalg.eigen import canonical_signs, descending_eigen, psd_root
from slimrank.linalg.symmetric import congruence, gram


@dataclass(frozen=True)
class Spectrum:
    """All singular values of a weight in its metric, and the basis to cut factors from at any rank.

    Attributes:
        values: min(m, n) singular values of W R, float64, largest first.
        basis: U (m x m) when side is "out"; R V (n x n) when side is "in".
        side: which of the two `basis` is.
        notes: anything unusual met on the way, for the report.
    """

    values: Tensor
    basis: Tensor
    side: Literal["out", "in"]
    notes: tuple[str, ...] = ()

    @property
    def full_rank(self) -> int:
        """min(m, n)."""
        return len(self.values)

    def tail(self, rank: int) -> float:
        """Squared error in the metric that is left at `rank`: sum of values[i]^2 over i >= rank."""
        return float(self.values[rank:].square().sum())

    def relative_error(self, rank: int) -> float:
        """|| (W - W') R ||_F / || W R ||_F at `rank` (0 for a weight without energy)."""
        total = self.tail(0)
        return (self.tail(rank) / total) ** 0.5 if total > 0 else 0.0

    def factors(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """A (rank x n) and B (m x rank), float64, with W' = B A. B has orthonormal columns.

        Args:
            weight: the W (m x n) that was solved.
            rank: 1 .. min(m, n).

        Raises:
            ValueError: rank outside that range.
        """
        if not 1 <= rank <= self.full_rank:
            raise ValueError(f"rank {rank} is outside 1..{self.full_rank}")
        w = weight.to(torch.float64)
        leading = self.basis[:, :rank].to(w)
        u = leading if self.side == "out" else torch.linalg.qr(w @ leading).Q
        u = canonical_signs(u)
        return u.t() @ w, u


def solve(weight: Tensor, column: Tensor | None = None) -> Spectrum:
    """Full spectrum of `weight` in the metric C = `column`, in float64, on the device of `weight`.

    Args:
        weight: W, m x n, any float dtype.
        column: C, n x n, positive semidefinite (its scale does not matter), or None for the identity.

    Returns:
        A `Spectrum` whose error at rank r is the least any rank-r matrix can have in this metric.
    """
    w = weight.to(torch.float64)
    c = None if column is None else column.to(w)
    if c is not None and float(c.trace()) == 0:
        plain = solve(weight)
        return replace(plain, notes=(*plain.notes, "the gram is zero (no tokens, or dead inputs): plain SVD instead"))
    m, n = w.shape
    return _solve_out(w, c) if m <= n else _solve_in(w, c)


def _solve_out(w: Tensor, c: Tensor | None) -> Spectrum:
    outer = gram(w.t()) if c is None else congruence(w, c)
    squares, u, notes = descending_eigen(outer)
    return Spectrum(squares.clamp(min=0).sqrt(), u, "out", notes)


def _solve_in(w: Tensor, c: Tensor | None) -> Spectrum:
    inner = gram(w)
    if c is None:
        squares, v, notes = descending_eigen(inner)
        return Spectrum(squares.clamp(min=0).sqrt(), v, "in", notes)
    root, root_notes = psd_root(c)
    squares, v, notes = descending_eigen(congruence(root.t(), inner))
    return Spectrum(squares.clamp(min=0).sqrt(), root @ v, "in", root_notes + notes)
