"""A step of both factors of a low-rank matrix against a gradient, without leaving its rank.

For W' = B A (m x n, rank r), S the gradient of a loss by W' and Q (n x n) a positive definite form on the inputs, the
step D of rank 2 r that minimises

    <S, D> + 1/2 tr(D Q D^T)    over D = dB A + B dA

is the projection of the unbounded one, -S Q^-1, on the tangent space: the gradient of Riemannian optimisation over
matrices of fixed rank (Vandereycken, 2013), in a metric (as in scaled gradient descent, Tong, Ma and Chi, 2021).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from slimrank.linalg.regression import spd_solve


@dataclass(frozen=True)
class Step:
    """A step of both factors.

    Attributes:
        A: change of A (r x n).
        B: change of B (m x r).
        decrease: of the loss, to first order, for the whole step; not negative.
    """

    A: Tensor
    B: Tensor
    decrease: float


def tangent_step(A: Tensor, B: Tensor, slope: Tensor, form: Tensor) -> Step:
    """Return the step of B A against a gradient, in float64. It depends on the product only, not on its factors.

    Args:
        A: r x n.
        B: m x r.
        slope: S (m x n).
        form: Q (n x n).
    """
    a, b, s = A.to(form), B.to(form), slope.to(form)
    left = spd_solve(b.t() @ b, b.t())
    d_a = -left @ spd_solve(form, s.t()).t()
    within = s @ a.t()
    d_b = -spd_solve(a @ form @ a.t(), within.t()).t()
    d_b = d_b - b @ (left @ d_b)  # what dA does already
    decrease = -float((d_b * within).sum() + (d_a * (b.t() @ s)).sum())
    return Step(d_a, d_b, decrease)
