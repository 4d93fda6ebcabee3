"""Choose some of the inputs of a linear layer, and let the chosen ones stand in for the others.

    min over S of k inputs, W' (m x k) of  || L^T (T - W' X_S) ||_F,   G = L L^T,   from  X X^T and T X^T

For a given S it is least squares: W' = T X_S^T (X_S X_S^T)^-1. With T = W X that is the Nystrom approximation of the
inputs' covariance C by its columns S: W' = W C[:, S] C[S, S]^-1 (MoDeGPT, arXiv 2408.09632, equation 7).
The best S is a hard problem; three selections approximate it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from slimrank.linalg.regression import Regression, spd_solve

Selection = Literal["eliminate", "leverage", "pivoted"]
FLOOR = 1e-10  # of a channel's energy: ridge that makes a covariance invertible


def restricted(problem: Regression, kept: Tensor) -> Tensor:
    """Return W' (m x k) that minimises || T - W' X_S ||_F, for S the inputs `kept` (k)."""
    gram = problem.gram[kept][:, kept]
    return spd_solve(gram, problem.cross[:, kept].t()).t()


def leverage(problem: Regression, count: int, row: Tensor | None = None) -> Tensor:
    """Choose the inputs of the largest ridge leverage scores (C (C + tr(C)/n I)^-1)_ii, as MoDeGPT does.

    Args:
        problem: the sums over tokens; only its inputs count.
        count: k.
        row: does not count.

    Returns:
        Their numbers (k), ascending.
    """
    gram = problem.gram
    ridge = gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    scores = spd_solve(gram + ridge * torch.eye(len(gram)).to(gram), gram).diagonal()
    return largest(scores, count)


def pivoted(problem: Regression, count: int, row: Tensor | None = None) -> Tensor:
    """Choose inputs by pivoted Cholesky of D^1/2 C D^1/2, D_i = w_i^T G w_i: the largest that is not explained yet.

    Args:
        problem: the sums over tokens; its solution is W.
        count: k.
        row: G (m x m); the identity by default.

    Returns:
        Their numbers (k), ascending.
    """
    scale = _weights(problem.solution(), row).sqrt()
    left = problem.gram * torch.outer(scale, scale)
    n, left_over = len(left), left.diagonal().clone()
    factor = left.new_zeros(count, n)
    chosen: list[int] = []
    for step in range(count):
        pivot = int(left_over.argmax())
        chosen.append(pivot)
        column = left[pivot] - factor[:step, pivot] @ factor[:step]
        root = column[pivot].clamp(min=torch.finfo(left.dtype).tiny).sqrt()
        factor[step] = column / root
        left_over -= factor[step].square()
        left_over[chosen] = -torch.inf
    return torch.tensor(chosen, device=left.device).sort().values


def eliminate(problem: Regression, count: int, row: Tensor | None = None) -> Tensor:
    """Choose inputs by taking away, each time, the one whose loss the others compensate best.

    Without input i the loss grows by q_i / P_ii, P = C_SS^-1, q_i = w_i^T G w_i, w_i its column in the least-squares W
    of those left (optimal brain surgeon for whole columns: ZipLM, arXiv 2302.04089). To take one away is a step of
    Cholesky on P: P - f f^T, f = P_i / sqrt(P_ii), and W - a f^T, a = w_i / sqrt(P_ii). So only f and W_0^T G a are
    computed for each of r inputs, n r^2 operations in all.

    Args:
        problem: the sums over tokens.
        count: k.
        row: G (m x m); the identity by default.

    Returns:
        Their numbers (k), ascending.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(problem.gram))
    weight = problem.cross @ inverse
    pulled = weight.t() @ (weight if row is None else row.to(weight) @ weight)
    n, removed = len(inverse), len(inverse) - count
    steps = _Steps(
        inverse.diagonal().clone(), pulled.diagonal().clone(), inverse.new_zeros(3, removed, max(n, removed))
    )
    left = torch.ones(n, dtype=torch.bool, device=inverse.device)
    for _ in range(removed):
        growth = torch.where(left, steps.energy / steps.diagonal, torch.inf)
        gone = int(growth.argmin())
        left[gone] = False
        steps.take(gone, inverse[gone], pulled[gone])
    return left.nonzero().flatten()


class _Steps:
    """Columns taken away so far: f, W_0^T G a and the products a_s^T G a_t, one row for each.

    Attributes:
        diagonal: of P now (n).
        energy: q now (n).
    """

    def __init__(self, diagonal: Tensor, energy: Tensor, room: Tensor) -> None:
        n, self.done = len(diagonal), 0
        self.diagonal, self.energy = diagonal, energy
        self._f, self._h, self._b = room[0, :, :n], room[1, :, :n], room[2, :, : room.shape[1]]

    def take(self, i: int, inverse: Tensor, pulled: Tensor) -> None:
        """Take input i away, given its rows of P and of W^T G W at first (n each)."""
        t = self.done
        f, h, b, at = self._f[:t], self._h[:t], self._b[:t, :t], self._f[:t, i]
        root, own = self.diagonal[i].sqrt(), self.energy[i] / self.diagonal[i]
        new_f, new_h, new_b = (inverse - at @ f) / root, (pulled - at @ h) / root, (h[:, i] - b @ at) / root
        self._f[t], self._h[t], self._b[t, :t], self._b[:t, t], self._b[t, t] = new_f, new_h, new_b, new_b, own
        self.energy += new_f * (new_f * own - 2 * (new_h - new_b @ f))
        self.diagonal -= new_f.square()
        self.done += 1


SELECTIONS: dict[str, Callable[[Regression, int, Tensor | None], Tensor]] = {
    "eliminate": eliminate,
    "leverage": leverage,
    "pivoted": pivoted,
}


def select(problem: Regression, count: int, selection: Selection, row: Tensor | None = None) -> Tensor:
    """Choose `count` inputs of a problem, each in units of its own energy; dead inputs come last.

    Args:
        problem: the sums over tokens.
        count: k, at most n.
        selection: how: see `eliminate`, `leverage` and `pivoted`.
        row: G (m x m), the form that errors of outputs are measured in; the identity by default.

    Returns:
        Their numbers (k), ascending.

    Raises:
        ValueError: more than there are, or less than one.
    """
    n = len(problem.gram)
    if not 1 <= count <= n:
        raise ValueError(f"{count} of {n} inputs cannot be chosen")
    if count == n:
        return torch.arange(n, device=problem.gram.device)
    alive = (problem.gram.diagonal() > 0).nonzero().flatten()
    if len(alive) <= count:
        dead = (problem.gram.diagonal() <= 0).nonzero().flatten()[: count - len(alive)]
        return torch.cat([alive, dead]).sort().values
    gram = problem.gram[alive][:, alive]
    part = Regression(gram + (FLOOR * gram.diagonal()).diag(), problem.cross[:, alive])
    return alive[SELECTIONS[selection](part, count, row)]


def largest(scores: Tensor, count: int) -> Tensor:
    """Return the numbers of the largest scores, ascending."""
    return scores.topk(count).indices.sort().values


def _weights(weight: Tensor, row: Tensor | None) -> Tensor:
    """Return w_i^T G w_i for every column of a weight (m x n)."""
    return weight.square().sum(dim=0) if row is None else (weight * (row.to(weight) @ weight)).sum(dim=0)
