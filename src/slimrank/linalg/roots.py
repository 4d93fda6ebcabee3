"""Square roots of positive semidefinite matrices: any root serves, none is ever inverted as a matrix."""

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
        inverse_scale: 1 / scale, 0 where a pseudo-inverse is meant.
        notes: anything unusual met on the way.
    """

    left: Tensor | None = None
    scale: Tensor | None = None
    inverse_scale: Tensor | None = None
    notes: tuple[str, ...] = ()

    def times(self, v: Tensor) -> Tensor:
        """R v."""
        scaled = v if self.scale is None else self.scale[:, None] * v
        return scaled if self.left is None else self.left @ scaled

    def inverse_transpose_times(self, v: Tensor) -> Tensor:
        """R^-T v."""
        if self.left is not None and self.scale is None:
            return torch.linalg.solve_triangular(self.left.t(), v, upper=True)
        scaled = v if self.inverse_scale is None else self.inverse_scale[:, None] * v
        return scaled if self.left is None else self.left @ scaled

    def congruence(self, k: Tensor) -> Tensor:
        """R^T k R for a symmetric k."""
        if self.left is None:
            return k if self.scale is None else self.scale[:, None] * k * self.scale
        if self.scale is None:
            return congruence(self.left.t(), k)
        return congruence((self.left * self.scale).t(), k)


def make_root(c: Tensor | None, kind: RootKind) -> Root:
    """A root of c (n x n), of its diagonal (n), or of the identity (None), float64.

    Args:
        c: positive semidefinite.
        kind: "cholesky" where c is numerically positive definite, else "eigen"; "eigen": Q Lambda^(1/2), eigenvalues
            below eps n lambda_max raised to that floor; "pseudo": the same with eigenvalues below 1e-6 lambda_max
            taken for zero, in R and in its pseudo-inverse.

    c is never shifted by its smallest eigenvalue: one massive activation makes that shift thousands of times larger
    than the true smallest eigenvalue.
    """
    if c is None:
        return Root()
    if c.dim() == 1:
        return _eigen_root(None, c, kind, ())
    if kind == "cholesky":
        factor, info = torch.linalg.cholesky_ex(c)
        if int(info) == 0:
            return Root(left=factor)
    values, vectors, notes = descending_eigen(c)
    return _eigen_root(vectors, values, kind, notes)


def _eigen_root(vectors: Tensor | None, values: Tensor, kind: RootKind, notes: tuple[str, ...]) -> Root:
    largest = values.amax().clamp(min=torch.finfo(values.dtype).tiny)
    if kind == "pseudo":
        kept = values > PSEUDO_TOLERANCE * largest
        scale = torch.where(kept, values.clamp(min=0).sqrt(), 0)
        return Root(vectors, scale, torch.where(kept, 1 / scale, 0), notes)
    floor = torch.finfo(values.dtype).eps * len(values) * largest
    clamped = int((values < floor).sum())
    if clamped:
        notes = (*notes, f"form is rank-deficient: {clamped} of {len(values)} eigenvalues raised to the floor")
    scale = values.clamp(min=floor).sqrt()
    return Root(vectors, scale, 1 / scale, notes)
