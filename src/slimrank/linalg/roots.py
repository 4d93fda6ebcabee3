"""Square roots of positive semidefinite matrices: any root works, and none is inverted as a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slimrank.linalg.eigen import descending_eigen
from slimrank.linalg.symmetric import congruence

RootKind = Literal["cholesky", "eigen", "pseudo"]
PSEUDO_TOLERANCE = (
    1e-6  # of the largest eigenvalue, below which "pseudo" takes one for zero; sums of float32 products err by 1e-7
)


@dataclass(frozen=True)
class Root:
    """R with C = R R^T.

    Attributes:
        left: lower triangular R, or the eigenvectors Q of R = Q diag(scale); None for a diagonal R.
        scale: square roots of the eigenvalues, or the diagonal of a diagonal R; None for a triangular one.
        inverse_scale: 1 / scale, 0 for a pseudo-inverse.
        notes: anything unusual.
    """

    left: Tensor | None = None
    scale: Tensor | None = None
    inverse_scale: Tensor | None = None
    notes: tuple[str, ...] = ()

    def times(self, v: Tensor) -> Tensor:
        """Return R v."""
        scaled = v if self.scale is None else self.scale[:, None] * v
        return scaled if self.left is None else self.left @ scaled

    def inverse_transpose_times(self, v: Tensor) -> Tensor:
        """Return R^-T v."""
        if self.left is not None and self.scale is None:
            return torch.linalg.solve_triangular(self.left.t(), v, upper=True)
        scaled = v if self.inverse_scale is None else self.inverse_scale[:, None] * v
        return scaled if self.left is None else self.left @ scaled

    def congruence(self, k: Tensor) -> Tensor:
        """Return R^T k R for a symmetric k."""
        if self.left is None:
            return k if self.scale is None else self.scale[:, None] * k * self.scale
        if self.scale is None:
            return congruence(self.left.t(), k)
        return congruence((self.left * self.scale).t(), k)


def make_root(c: Tensor | None, kind: RootKind) -> Root:
    """Return a root of c (n x n), of its diagonal (n), or of the identity (None), in float64.

    Args:
        c: positive semidefinite.
        kind: "cholesky" where c is numerically positive definite, else "eigen"; "eigen": Q Lambda^(1/2), eigenvalues
            below eps n lambda_max raised to that floor; "pseudo": on the span of c only, zero beside it, with its
            pseudo-inverse.

    c is never shifted by its smallest eigenvalue: one massive activation makes that shift thousands of times larger
    than the true smallest eigenvalue.
    """
    if c is None:
        return Root()
    if kind == "pseudo":
        return _diagonal_pseudo_root(c) if c.dim() == 1 else _pseudo_root(c)
    if c.dim() == 1:
        return _eigen_root(None, c, ())
    if kind == "cholesky":
        factor, info = torch.linalg.cholesky_ex(c)
        if int(info) == 0:
            return Root(left=factor)
    values, vectors, notes = descending_eigen(c)
    return _eigen_root(vectors, values, notes)


def _eigen_root(vectors: Tensor | None, values: Tensor, notes: tuple[str, ...]) -> Root:
    largest = values.amax().clamp(min=torch.finfo(values.dtype).tiny)
    floor = torch.finfo(values.dtype).eps * len(values) * largest
    clamped = int((values < floor).sum())
    if clamped:
        notes = (*notes, f"form is rank-deficient: {clamped} of {len(values)} eigenvalues raised to the floor")
    scale = values.clamp(min=floor).sqrt()
    return Root(vectors, scale, 1 / scale, notes)


def _diagonal_pseudo_root(c: Tensor) -> Root:
    scale = c.clamp(min=0).sqrt()
    return Root(None, scale, _reciprocal(scale))


def _pseudo_root(c: Tensor) -> Root:
    """Return a root on the span of c. The correlation matrix defines the span, so a large channel hides no other."""
    deviation = c.diagonal().clamp(min=0).sqrt()
    inverse = _reciprocal(deviation)
    values, vectors, _ = descending_eigen(inverse[:, None] * c * inverse)
    spanning = deviation[:, None] * vectors[:, values > PSEUDO_TOLERANCE * values[0]]
    whole = torch.linalg.qr(spanning, mode="complete").Q
    span, rest = whole[:, : spanning.shape[1]], whole[:, spanning.shape[1] :]
    values, vectors, notes = descending_eigen(congruence(span.t(), c))
    scale = torch.cat([values.clamp(min=0).sqrt(), values.new_zeros(rest.shape[1])])
    return Root(torch.cat([span @ vectors, rest], dim=1), scale, _reciprocal(scale), notes)


def _reciprocal(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, 1 / scale, 0)
