"""Gradient descent on soft ranks: what FermiGrad and Dobi-SVD share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from slimrank.budget.curves import Floats
from slimrank.budget.measured_curves import effect_of
from slimrank.budget.problem import Allocation, Problem
from slimrank.budget.ranks import Rank
from slimrank.errors import NonFiniteError


def stored(problem: Problem, ranks: Tensor) -> Tensor:
    """Return the bits of all items at real-valued ranks, differentiable; none exceeds its dense weight."""
    costs: list[Any] = [problem.bits(item, rank) for item, rank in zip(problem.items, cast(Any, ranks), strict=True)]
    return torch.minimum(torch.stack(costs), torch.from_numpy(problem.sizes))


def full_ranks(problem: Problem) -> Tensor:
    """Return min(m, n) of every item, float64."""
    return torch.tensor([min(item.shape) for item in problem.items], dtype=torch.float64)


def ranks_of_fractions(problem: Problem, fractions: Floats) -> Tensor:
    """Find the real-valued ranks at which items store these fractions of their parameters, by bisection."""
    top = full_ranks(problem)
    low, high = torch.ones_like(top), top.clone()
    wanted = torch.from_numpy(fractions * problem.sizes)
    for _ in range(60):
        middle = (low + high) / 2
        over = stored(problem, middle) > wanted
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    return low


def kept_fractions(problem: Problem, ranks: Floats) -> Floats:
    """Return the fractions of parameters that items store at real-valued ranks; above 1 they grow with the rank."""
    kept = stored(problem, torch.from_numpy(ranks)).numpy() / problem.sizes
    return np.where(kept < 1, kept, 1 + ranks / full_ranks(problem).numpy())


def best_of(problem: Problem, plans: Mapping[str, Mapping[str, Rank]]) -> Allocation:
    """Return the plan of least measured divergence, the first of equal ones, with a note of all divergences."""
    effects = {name: effect_of(problem, ranks).kl for name, ranks in plans.items()}
    best = min(effects, key=lambda name: effects[name])
    measured = ", ".join(f"{name} {effect:.4g}" for name, effect in effects.items())
    return Allocation(plans[best], notes=(f"kept the plan of '{best}'; divergences: {measured}",))


def finite(loss: Tensor, where: str) -> Tensor:
    """Return a loss that is a finite number.

    Raises:
        NonFiniteError: it is NaN or infinite.
    """
    if not bool(torch.isfinite(loss)):
        raise NonFiniteError(f"the loss {where} is NaN or infinite.", "run in float32 (--dtype float32)")
    return loss


def descend(
    start: Tensor,
    top: Tensor,
    steps: int,
    rate: float,
    objective: Callable[[Tensor, int], Tensor],
) -> Floats:
    """Run Adam on ranks as fractions of the full ones, clamped to [1, full rank]; return the mean of the last quarter.

    Args:
        start: ranks to begin with.
        top: full ranks.
        steps: number of steps.
        rate: step size, as a fraction of the full rank.
        objective: (ranks, step) -> the value to minimise.

    Raises:
        NonFiniteError: the objective is NaN or infinite.
    """
    fractions = (start / top).clone().requires_grad_()
    optimiser = torch.optim.Adam([fractions], lr=rate)
    kept: list[Tensor] = []
    for step in range(steps):
        optimiser.zero_grad()
        with torch.enable_grad():
            loss = finite(objective(fractions * top, step), f"at step {step + 1} of {steps} of the descent")
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            fractions.copy_(torch.minimum(torch.maximum(fractions, 1 / top), torch.ones_like(top)))
        if step >= steps - max(1, steps // 4):
            kept.append((fractions * top).detach().clone())
    return np.asarray(torch.stack(kept).mean(dim=0).numpy(), dtype=np.float64)
