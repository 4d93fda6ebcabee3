"""The one weighted low-rank solver.

    min over rank(W') <= r of || L^T (W - W') R ||_F ,   G = L L^T (m x m),  C = R R^T (n x n),  W m x n

Solved on the smaller side, where the big form is only needed as seen through W:

* out-side (m <= n): U = eigenvectors of L^T (W C W^T) L;  W' = L^-T U_r U_r^T L^T W
* in-side  (m > n):  V = eigenvectors of R^T (W^T G W) R;  W' = W R V_r V_r^T R^-1

Either is an oblique projector beside W, P_r D_r^T W or W P_r D_r^T. Where G is the identity nothing is inverted at all:
W' = U_r U_r^T W with U_r orthonormal. Factors are nested: those of rank r are a prefix of those of rank r + 1.

Forms F2 and F3 of the literature's closed forms (COALA, arXiv 2507.07580; SVD-LLM, arXiv 2403.07378 needs R^-1 for the
same result; K-FAC whitening on both sides). Reduced-rank regression is the same problem with another W, see
`linalg.regression`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from slimrank.linalg.eigen import canonical_signs, descending_eigen, leading_eigen
from slimrank.linalg.forms import Form, Metric
from slimrank.linalg.roots import Root, RootKind

Side = Literal["out", "in"]
RANDOMISED_BELOW = 8  # randomised where rank <= min(m, n) / this: elsewhere the exact solver is faster


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a weight in its metric, and the bases from which factors of any rank are taken.

    Attributes:
        values: k singular values of L^T W R, float64, largest first; k = min(m, n) unless solved for a rank.
        basis: P (m x k) when side is "out", (n x k) when it is "in".
        side: the side of the weight on which the projector is.
        dual: D, of the shape of P, where the projector is oblique; None where B is to be orthonormal.
        beyond: energy (sum of squared singular values) beyond the k values.
        stand_in: a form of the metric was zero and the identity replaced it: values are in another unit.
        plain_rows: G is the identity.
        notes: anything unusual, for the report.
    """

    values: Tensor
    basis: Tensor
    side: Side
    dual: Tensor | None = None
    beyond: float = 0.0
    stand_in: bool = False
    plain_rows: bool = False
    notes: tuple[str, ...] = ()

    @property
    def full_rank(self) -> int:
        """Return the largest rank that factors can have."""
        return len(self.values)

    def tail(self, rank: int) -> float:
        """Return the squared error in the metric that is left at `rank`: sum of values[i]^2 over i >= rank."""
        return float(self.values[rank:].square().sum()) + self.beyond

    def relative_error(self, rank: int) -> float:
        """Return || L^T (W - W') R ||_F / || L^T W R ||_F at `rank` (0 for a weight without energy)."""
        total = self.tail(0)
        return (self.tail(rank) / total) ** 0.5 if total > 0 else 0.0

    def row(self) -> Form:
        """Return the form G on the outputs that this was solved in, damping included, up to its scale.

        Out-side D = L U, so that G = D D^T; in-side R^T (W^T G W) R = V S^2 V^T and D = R^-T V, so that D S^2 D^T is
        W^T G W: the form as seen through W.

        Raises:
            ValueError: the spectrum holds only its leading components.
        """
        if self.plain_rows or self.dual is None:
            return Form()
        d = self.dual.to(torch.float64)
        if len(self.values) < (len(d) if self.side == "out" else 0) or self.beyond:
            raise ValueError("the leading components of a spectrum do not hold the form that it was solved in")
        if self.side == "out":
            return Form(d @ d.t())
        scaled = d * self.values.to(d)
        return Form(scaled @ scaled.t(), seen=True)

    def scaled(self, factor: float) -> Spectrum:
        """Multiply squared errors by a factor: the metric in another unit, which changes no factors of the weight."""
        return replace(self, values=self.values * factor**0.5, beyond=self.beyond * factor)

    def factors(self, weight: Tensor, rank: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Return A (rank x n) and B (m x rank) with W' = B A; columns of B have unit norm and canonical signs.

        Args:
            weight: the W (m x n) that was solved.
            rank: 1 .. full_rank.
            dtype: what to compute in. float32 costs an error of some 1e-6 of the weight, which is negligible for
                factors stored in float32 or less; see benchmarks/methods_cost.py.

        Raises:
            ValueError: rank outside that range.
        """
        if not 1 <= rank <= self.full_rank:
            raise ValueError(f"rank {rank} is outside 1..{self.full_rank}")
        w = weight.to(dtype)
        p = self.basis[:, :rank].to(w)
        if self.dual is None:
            b = p if self.side == "out" else torch.linalg.qr(w @ p).Q
            b = b * canonical_signs(b)
            return b.t() @ w, b
        d = self.dual[:, :rank].to(w)
        a, b = (d.t() @ w, p) if self.side == "out" else (d.t(), w @ p)
        norms = b.norm(dim=0)
        scale = canonical_signs(b) * torch.where(norms > 0, norms, 1)
        return a * scale[:, None], b / scale


def solve(
    weight: Tensor,
    metric: Metric | None = None,
    *,
    rank: int | None = None,
    side: Side | None = None,
    root: RootKind = "cholesky",
) -> Spectrum:
    """Return the spectrum of `weight` in a metric, in float64, on the device of `weight`.

    Args:
        weight: W, m x n, any float dtype.
        metric: G and C, whose scales do not matter; None is the identity on both sides. A form that is zero counts
            as the identity; the notes say so.
        rank: number of components that are needed. Up to min(m, n) / 8 they come from a randomised solver, and
            the notes say so; beyond that the exact one is faster.
        side: solve on this side instead of the smaller one.
        root: which square root to take of the form on that side; the result does not depend on it, except that
            "pseudo" leaves W' zero on inputs that the metric does not see.

    Returns:
        A `Spectrum` whose error at rank r is the least any rank-r matrix can have in this metric.

    Raises:
        ValueError: a form is only seen through the weight, and the requested side needs it whole.
    """
    w = weight.to(torch.float64)
    chosen, notes = _without_zeros((metric or Metric()).to(w))
    m, n = w.shape
    side = side or ("out" if m <= n or chosen.column.seen else "in")
    near, far, seen_by = (chosen.row, chosen.column, w) if side == "out" else (chosen.column, chosen.row, w.t())
    near_root = near.root(root)
    inner = near_root.congruence(far.through(seen_by))
    count = min(m, n)
    if rank is not None and rank * RANDOMISED_BELOW <= count:
        squares, vectors = leading_eigen(inner, rank)
        beyond = max(0.0, float(inner.trace() - squares.sum()))
        more: tuple[str, ...] = (f"randomised solver for {rank} of {count} components",)
    else:
        squares, vectors, more = descending_eigen(inner)
        squares, vectors, beyond = squares[:count], vectors[:, :count], 0.0
    orthonormal = chosen.row.is_identity and root != "pseudo"
    return Spectrum(
        values=squares.clamp(min=0).sqrt(),
        basis=near_root.times(vectors) if side == "in" else near_root.inverse_transpose_times(vectors),
        side=side,
        dual=None if orthonormal else _dual(near_root, vectors, side),
        beyond=beyond,
        stand_in=bool(notes),
        plain_rows=chosen.row.is_identity,
        notes=notes + near_root.notes + more,
    )


def _dual(root: Root, vectors: Tensor, side: Side) -> Tensor:
    return root.inverse_transpose_times(vectors) if side == "in" else root.times(vectors)


def _without_zeros(metric: Metric) -> tuple[Metric, tuple[str, ...]]:
    """Replace zero forms of a metric by the identity; return it and notes that say so."""
    notes: tuple[str, ...] = ()
    if metric.column.is_zero:
        metric = replace(metric, column=Form())
        notes = ("the inputs' form is zero (no tokens, or dead inputs)",)
    if metric.row.is_zero:
        metric = replace(metric, row=Form())
        notes = (*notes, "the gradients' form is zero")
    if notes:
        plain = metric.row.is_identity and metric.column.is_identity
        notes = tuple(f"{note}: {'plain SVD' if plain else 'the identity'} instead" for note in notes)
    return metric, notes
