"""Positive semidefinite forms, in which the error of a weight is measured on either side.

A `Metric` is a pair of them. The error of W' is || L^T (W - W') R ||_F with G = L L^T on the rows of W (its
outputs) and C = R R^T on the columns (its inputs).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from slimrank.linalg.roots import Root, RootKind, make_root
from slimrank.linalg.symmetric import congruence, gram

Towards = Literal["diagonal", "identity"]


@dataclass(frozen=True)
class Form:
    """A positive semidefinite form on R^n, or the part of it that one weight sees.

    Attributes:
        data: the form itself (n x n), its diagonal (n), or None for the identity. When `seen` it is w C w^T (m x m)
            instead, for the only m x n matrix w that the form is applied to: the small side of a big form.
        seen: see above.
        diagonal: the diagonal of C (n), the unit of damping; damping a seen form needs it.
        keep: factor on `data`.
        ridge: the diagonal (n) of a matrix to add, or one number for all of it.
    """

    data: Tensor | None = None
    seen: bool = False
    diagonal: Tensor | None = None
    keep: float = 1.0
    ridge: Tensor | float = 0.0

    @property
    def is_identity(self) -> bool:
        """Tell whether it is (a multiple of) the identity."""
        return self.data is None

    @property
    def is_zero(self) -> bool:
        """Tell whether it is zero: no tokens, or dead channels only."""
        return self.data is not None and not self.is_damped and float(self.data.abs().amax()) == 0

    @property
    def is_damped(self) -> bool:
        """Tell whether a ridge is added."""
        return bool((self.ridge > 0).any()) if isinstance(self.ridge, Tensor) else self.ridge > 0

    @property
    def energies(self) -> Tensor:
        """Return the diagonal (n) of the undamped form.

        Raises:
            ValueError: a seen form whose diagonal was not given, or the identity.
        """
        if self.diagonal is not None:
            return self.diagonal
        if self.data is None or self.seen:
            raise ValueError("a form seen through a weight can only be damped when its diagonal is given")
        return self.data.diagonal() if self.data.dim() == 2 else self.data

    @property
    def average(self) -> float:
        """Return tr(C) / n of the undamped form.

        Raises:
            ValueError: a seen form whose diagonal was not given.
        """
        return 1.0 if self.data is None else float(self.energies.mean())

    def shrunk(self, alpha: float, towards: Towards = "diagonal") -> Form:
        """Return (1 - alpha) C + alpha T.

        Args:
            alpha: 0 keeps C, 1 leaves T only.
            towards: T. "diagonal" is diag(C): the scale of a channel does not matter then. "identity" is tr(C)/n I, the
                rule of LEMS: one large channel damps all others.
        """
        if self.data is None:
            return self
        target = channel_energies(self.energies) if towards == "diagonal" else self.average
        return replace(self, keep=self.keep * (1 - alpha), ridge=self.ridge * (1 - alpha) + alpha * target)

    def with_ridge(self, alpha: float) -> Form:
        """Return C + alpha tr(C)/n I."""
        return replace(self, ridge=self.ridge + alpha * self.average)

    def to(self, other: Tensor) -> Form:
        """Return the form in dtype and on the device of `other`."""
        if self.data is None:
            return self
        diagonal = None if self.diagonal is None else self.diagonal.to(other)
        ridge = self.ridge.to(other) if isinstance(self.ridge, Tensor) else self.ridge
        return replace(self, data=self.data.to(other), diagonal=diagonal, ridge=ridge)

    def matrix(self) -> Tensor | None:
        """Return keep data + ridge I (n x n, or n if it is diagonal); None for the identity."""
        if self.data is None:
            return None
        if self.data.dim() == 1:
            return self.keep * self.data + self.ridge
        full = self.keep * self.data if self.keep != 1 else self.data
        if self.is_damped:
            full = full.clone() if full is self.data else full
            full.diagonal().add_(self.ridge)
        return full

    def through(self, w: Tensor) -> Tensor:
        """Return w C w^T (m x m) for w (m x n)."""
        if self.data is None:
            return gram(w.t())
        if self.seen:
            return self.keep * self.data + self._ridge_through(w) if self.is_damped else self.keep * self.data
        c = self.matrix()
        assert c is not None
        return gram((w * c.sqrt()).t()) if c.dim() == 1 else congruence(w, c)

    def _ridge_through(self, w: Tensor) -> Tensor:
        if isinstance(self.ridge, Tensor):
            return gram((w * self.ridge.sqrt()).t())
        return self.ridge * gram(w.t())

    def after(self, change: Tensor) -> Form:
        """Return the same form for W M instead of W (M n x n); of a row form seen as W^T G W, M^T W^T G W M.

        A form that is whole does not change.
        """
        return replace(self, data=congruence(change.t(), self.data)) if self.seen and self.data is not None else self

    def root(self, kind: RootKind) -> Root:
        """Return a square root of the form.

        Raises:
            ValueError: of a form that is only seen through a weight.
        """
        if self.seen:
            raise ValueError("a form seen through a weight has no root; solve on the other side")
        return make_root(self.matrix(), kind)


@dataclass(frozen=True)
class Metric:
    """The pair of forms that a method minimises in.

    Attributes:
        row: G on the outputs (m x m).
        column: C on the inputs (n x n).
    """

    row: Form = field(default_factory=Form)
    column: Form = field(default_factory=Form)

    @classmethod
    def of(cls, row: Tensor | None = None, column: Tensor | None = None) -> Metric:
        """Make a metric of matrices (or their diagonals); None is the identity."""
        return cls(Form(row), Form(column))

    def to(self, other: Tensor) -> Metric:
        """Return the metric in dtype and on the device of `other`."""
        return Metric(self.row.to(other), self.column.to(other))

    def squared(self, error: Tensor) -> float:
        """Return tr(E^T G E C) of an error E (m x n), by the definition; for checks, not for speed.

        Raises:
            ValueError: a form is only seen through a weight.
        """
        if self.row.seen or self.column.seen:
            raise ValueError("a form seen through a weight cannot measure other matrices")
        e = error.to(torch.float64)
        return float((_apply(self.row.to(e), e) * _apply(self.column.to(e), e.t()).t()).sum())


def channel_energies(diagonal: Tensor) -> Tensor:
    """Return the diagonal of a form (n) with the median of the others instead of zeros.

    A channel that was zero in all tokens says nothing about its scale. It counts as a typical one, so that a ridge in
    units of this diagonal still protects the weights that read it.
    """
    alive = diagonal > 0
    return torch.where(alive, diagonal, diagonal[alive].median()) if bool(alive.any()) else diagonal


def _apply(form: Form, e: Tensor) -> Tensor:
    c = form.matrix()
    if c is None:
        return e
    return c[:, None] * e if c.dim() == 1 else c @ e
