"""Least squares against a target: closed forms for factors that must reproduce outputs other than W X.

    min over W' of || T - W' X ||_F ,   given only  gram = X X^T (n x n),  cross = T X^T (m x n),  energy = || T ||_F^2

With a rank bound this is reduced-rank regression. Its loss is that of the unbounded solution W_ls plus
|| (W_ls - W') R ||_F^2, gram = R R^T: the weighted low-rank problem of `linalg.lowrank` with W_ls instead of W.
Where T = W Z comes from a weight, W_ls = W M with M = Z X^T gram^-1, and a form on the outputs that is only seen
through W (W^T G W) is seen through W_ls as well: M^T W^T G W M.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from slimrank.linalg.eigen import descending_eigen
from slimrank.linalg.forms import Form, Metric, Towards, channel_energies
from slimrank.linalg.lowrank import Spectrum, solve

PINV_TOLERANCE = 1e-10  # of the largest eigenvalue, or of a channel's energy


@dataclass(frozen=True)
class Regression:
    """A least-squares problem by its sums over tokens, float64.

    Attributes:
        gram: sum of x x^T (n x n).
        cross: sum of t x^T (m x n).
        energy: sum of |t|^2.
        mixed: where t = W z for a weight W and some z, the sum of z x^T (n x n).
        row: G on the outputs: || L^T (T - W' X) ||_F, G = L L^T, is minimised. It may be a form that is only seen
            through that W. Least squares without a rank bound does not depend on it.
    """

    gram: Tensor
    cross: Tensor
    energy: float = 0.0
    mixed: Tensor | None = None
    row: Form = field(default_factory=Form)

    @classmethod
    def of(cls, inputs: Tensor, targets: Tensor) -> Regression:
        """Make the problem of tokens as rows: inputs (N x n), targets (N x m)."""
        x, t = inputs.to(torch.float64), targets.to(torch.float64)
        return cls(x.t() @ x, t.t() @ x, float(t.square().sum()))

    def loss(self, weight: Tensor) -> float:
        """Return || T - W' X ||_F^2 of a weight W' (m x n)."""
        w = weight.to(self.gram)
        return self.energy - 2 * float((self.cross * w).sum()) + float((w @ self.gram * w).sum())

    def ridge_unit(self, kind: Towards) -> Tensor:
        """Return the diagonal (n) that ridges are multiples of: diag(gram), or tr(gram)/n in every place."""
        energies = self.gram.diagonal()
        return channel_energies(energies) if kind == "diagonal" else energies.mean().expand_as(energies)

    def towards(self, weight: Tensor, alpha: float, unit: Towards = "diagonal") -> Regression:
        """Add the penalty alpha tr((W' - W) D (W' - W)^T), as if such inputs asked for W itself.

        Args:
            weight: W (m x n).
            alpha: 0 adds nothing.
            unit: what D is: see `ridge_unit`. With "diagonal" the solution does not depend on the scale of a channel.
        """
        ridge, w = alpha * self.ridge_unit(unit), weight.to(self.gram)
        energy = self.energy + float((w.square() * ridge).sum())
        mixed = None if self.mixed is None else self.mixed + ridge.diag()
        return replace(self, gram=self.gram + ridge.diag(), cross=self.cross + w * ridge, energy=energy, mixed=mixed)

    def shrunk(self, weight: Tensor, alpha: float, unit: Towards = "diagonal") -> Regression:
        """Return the undamped problem that has the solution of `towards`; its metric remains that of the inputs."""
        damped = self.towards(weight, alpha, unit)
        mixed = None if damped.mixed is None else spd_solve(damped.gram, damped.mixed.t()).t() @ self.gram
        return replace(self, cross=damped.solution() @ self.gram, mixed=mixed)

    def lacking(self, other: Regression, weight: Tensor) -> Tensor:
        """Return C^T G C' (n x n), C = (T - W X) X^T of this problem and C' of another with the same form G."""
        if self.row.seen:
            if self.mixed is None or other.mixed is None:
                raise ValueError("the form is seen through a weight, and the targets do not come from one")
            mine, others = self.mixed - self.gram, other.mixed - other.gram
        else:
            w = weight.to(self.gram)
            mine, others = self.cross - w @ self.gram, other.cross - w @ other.gram
        form = self.row.matrix()
        if form is None:
            return mine.t() @ others
        return mine.t() @ (form[:, None] * others if form.dim() == 1 else form @ others)

    def solution(self) -> Tensor:
        """Return W_ls (m x n) of least norm."""
        return spd_solve(self.gram, self.cross.t()).t()

    def metric(self) -> Metric:
        """Return the metric in which the error of a low-rank W' is measured, against W_ls.

        Raises:
            ValueError: a row form that is seen through a weight, and targets that do not come from that weight.
        """
        if not self.row.seen:
            return Metric(self.row, Form(self.gram))
        if self.mixed is None:
            raise ValueError("the form is seen through a weight, and the targets do not come from one")
        return Metric(self.row.after(spd_solve(self.gram, self.mixed.t()).t()), Form(self.gram))


def reduced_rank(problem: Regression) -> tuple[Spectrum, Tensor]:
    """Solve reduced-rank regression at every rank: return a spectrum, and the weight W_ls to take its factors from."""
    best = problem.solution()
    return solve(best, problem.metric()), best


def best_b(problem: Regression, A: Tensor) -> Tensor:
    """Return B (m x rank) that minimises || T - B A X ||_F for a given A (rank x n): least squares on A X.

    This is the update of SVD-LLM (arXiv 2403.07378) and AdaSVD (arXiv 2502.01403) from sums instead of tokens. With the
    cast A it compensates part of the rounding.
    """
    a = A.to(problem.gram)
    return spd_solve(a @ problem.gram @ a.t(), a @ problem.cross.t()).t()


def best_a(B: Tensor, best: Tensor) -> Tensor:
    """Return A (rank x n) that minimises || T - B A X ||_F for a given B (m x rank), from W_ls; inputs cancel out."""
    b = B.to(best)
    return spd_solve(b.t() @ b, b.t() @ best)


def alternate(problem: Regression, A: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Run `iterations` rounds of B, then A, each exact for the other: AdaSVD's adaComp, arXiv 2502.01403.

    One round is one step of subspace iteration towards `reduced_rank`, of rate (sigma_{r+1} / sigma_r)^2, and never
    raises the loss.
    """
    best = problem.solution()
    B = best_b(problem, A)
    for _ in range(iterations):
        A = best_a(B, best)
        B = best_b(problem, A)
    return A, B


def spd_solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Return matrix^+ right for a positive semidefinite matrix: by Cholesky, or by eigenvalues where it is singular.

    A matrix is singular if a pivot, which is what a channel adds to those before it, is a negligible part of the
    channel's energy. So the scale of a channel does not matter.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) == 0 and bool((factor.diagonal().square() > PINV_TOLERANCE * matrix.diagonal()).all()):
        return torch.cholesky_solve(right, factor)
    alive = ~(matrix.diagonal() <= 0)  # NaN stays, for the eigen-solver to refuse
    found = torch.zeros_like(right)
    found[alive] = _singular_solve(matrix[alive][:, alive], right[alive])
    return found


def _singular_solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Return matrix^+ right. Eigenvalues of the correlation matrix tell the span: all channels count alike in it."""
    scale = matrix.diagonal().rsqrt()[:, None]
    values, vectors, _ = descending_eigen(scale * matrix * scale.t())
    kept = values > PINV_TOLERANCE * values[:1]
    span, null = vectors[:, kept], scale * vectors[:, ~kept]
    found = scale * (span @ (span.t() @ (scale * _beside(null, right)) / values[kept, None]))
    return _beside(null, found)


def _beside(null: Tensor, x: Tensor) -> Tensor:
    """Return the part of x that is orthogonal to the columns of `null`."""
    return x - null @ torch.linalg.lstsq(null, x).solution
