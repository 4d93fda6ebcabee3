"""Ranks by gradient descent through truncated activations."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from slimrank.budget.problem import Allocation, Problem, Transform
from slimrank.budget.proportional import ranks_from_fractions
from slimrank.methods.allocator import allocator
from slimrank.methods.soft_ranks import best_of, descend, full_ranks, kept_fractions, ranks_of_fractions, stored

Steps = Annotated[int, Field(ge=1, description="Steps of the descent, each on one batch of search windows.")]
Rate = Annotated[float, Field(gt=0, le=1, description="Size of a step, as a fraction of the full rank.")]
Penalty = Annotated[float, Field(gt=0, description="Weight of the relative distance from the budget.")]
Sharpness = Annotated[float, Field(gt=0, description="beta of the soft step 1/2 tanh(beta (g - i)) + 1/2.")]
PASSES = 15.0  # as long as a loss and its gradient, with the singular values of all outputs, take
BLUR = 1e-3  # of the largest singular value: gaps below it do not make gradients any larger


@allocator(
    id="dobi",
    title="Gradient descent through softly truncated activations",
    paper="Dobi-SVD, arXiv 2502.02723",
    needs=["gradient"],
    passes=lambda options, layers, batches: PASSES * options["steps"] / batches + 3,
    gradient_passes=PASSES,
)
def dobi(
    problem: Problem, *, steps: Steps = 20, rate: Rate = 0.0025, penalty: Penalty = 200.0, sharpness: Sharpness = 10.0
) -> Allocation:
    """Minimise perplexity + penalty |P / budget - 1| over g, from the uniform ranks.

    The outputs of a layer on one window are U diag(s t) V^T with t_i = 1/2 tanh(beta (g - i)) + 1/2; g, as a fraction
    of min(tokens, m, n), is the rank as a fraction of min(m, n). Of the result and the uniform plan, the one of less
    measured divergence is taken.
    """
    top = full_ranks(problem)
    probe = problem.measured()
    first = ranks_of_fractions(problem, np.full(len(problem.items), problem.keep_ratio))

    def objective(ranks: Tensor, step: int) -> Tensor:
        fractions = ranks / top
        transforms = {item.path: _truncating(f, sharpness) for item, f in zip(problem.items, fractions, strict=True)}
        loss = probe.loss(transforms, step % probe.batches()).cpu().double()
        return loss.exp() + penalty * (stored(problem, ranks).sum() / problem.budget - 1).abs()

    ranks = descend(first, top, steps, rate, objective)
    found = ranks_from_fractions(problem, kept_fractions(problem, ranks))
    return best_of(problem, {"descent": found, "uniform": ranks_from_fractions(problem, np.zeros(len(problem.items)))})


def _truncating(fraction: Tensor, sharpness: float) -> Transform:
    def transform(x: Tensor, y: Tensor, rows: slice) -> Tensor:
        count = min(*y.shape[-2:], x.shape[-1])
        index = torch.arange(1, count + 1, dtype=torch.float64)
        soft = 0.5 * torch.tanh(sharpness * (fraction * count - index)) + 0.5
        return SoftTruncation.apply(y, soft.to(y.dtype).to(y.device))  # first the dtype: mps has no float64

    return transform


class SoftTruncation(torch.autograd.Function):
    """Y = U diag(s) V^T to U diag(s t) V^T, with gradients that stay finite where singular values are equal.

    With P = U^T G V the gradient by Y is U (K o sym P + L o skew P) V^T, and G's part outside of U and V times t;
    K_ij = (s_i t_i - s_j t_j) / (s_i - s_j) and L_ij = (s_i t_i + s_j t_j) / (s_i + s_j). K is unbounded where s_i
    comes near s_j while t_i is not t_j; there the gap d is replaced by (d^2 + blur^2) / d.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, t: Tensor) -> Tensor:
        """Truncate batches of matrices y (... x tokens x m) to their k largest singular values times t (k).

        Where k < min(tokens, m), the other singular values are zero: y is W x with n = k inputs.
        """
        u, s, vh = torch.linalg.svd(y.float() if y.dtype != torch.float64 else y, full_matrices=False)
        u, s, vh = u[..., : len(t)], s[..., : len(t)], vh[..., : len(t), :]
        ctx.save_for_backward(u, s, vh, t)
        return ((u * (s * t.to(s))[..., None, :]) @ vh).to(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients by y and by t."""
        u, s, vh, t = ctx.saved_tensors
        g, v, weight = gradients[0].to(u), vh.mT, t.to(u)
        gv, ug = g @ v, u.mT @ g
        p = ug @ v
        even, odd = _divided(s, weight)
        inner = even * (p + p.mT) / 2 + odd * (p - p.mT) / 2
        by_y = u @ inner @ vh + (gv - u @ p) * weight @ vh + u * weight @ (ug - p @ vh)
        by_t = (s * p.diagonal(dim1=-2, dim2=-1)).reshape(-1, len(t)).sum(dim=0)
        return by_y.to(gradients[0]), by_t.to(t)


def _divided(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return K and L."""
    gap, total = s[..., :, None] - s[..., None, :], s[..., :, None] + s[..., None, :]
    step = t[:, None] - t[None, :]
    blur = (BLUR * s[..., :1, None]) ** 2
    tiny = torch.finfo(s.dtype).tiny
    even = (t[:, None] + t[None, :]) / 2 + total / 2 * step * gap / (gap**2 + blur + tiny)
    odd = (t[:, None] + t[None, :]) / 2 + gap / 2 * step / (total + tiny)
    return even, odd
