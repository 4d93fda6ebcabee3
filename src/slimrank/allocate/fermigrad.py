"""Ranks by gradient descent: Fermi functions cut the components of every weight softly."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from slimrank.allocate.knapsack import solve
from slimrank.allocate.problem import Allocation, Problem, Transform
from slimrank.allocate.registry import allocator
from slimrank.allocate.shares import ranks_from_fractions
from slimrank.allocate.soft import descend, full_ranks, ranks_of_fractions, stored

Steps = Annotated[int, Field(ge=1, description="Steps of the descent, each on one batch of search windows.")]
Rate = Annotated[float, Field(gt=0, le=1, description="Size of a step, as a fraction of the full rank.")]
Penalty = Annotated[float, Field(gt=0, description="Weight of the squared relative distance from the budget.")]
Start = Annotated[
    Literal["spectrum", "uniform", "full"],
    Field(description="Begin at the plan of that allocation, or at full rank with a penalty that grows."),
]
WARM, COLD = 1 / 64, 1 / 640  # temperatures, as fractions of the full rank


@allocator(
    id="fermigrad",
    title="Gradient descent on soft ranks under a penalty on the size",
    paper="FermiGrad, arXiv 2512.03062",
    needs=["spectra", "gradient"],
    passes=lambda options, layers, batches: 7.0 * options["steps"] / batches,
)
def fermigrad(
    problem: Problem, *, steps: Steps = 60, rate: Rate = 0.005, penalty: Penalty = 100.0, start: Start = "spectrum"
) -> Allocation:
    """Minimise loss(f) + penalty ((P - budget) / budget)^2 over mu, f_k = 1 / (1 + exp((k - 1/2 - mu) / T)).

    Component k of a layer is multiplied by f_k; the loss is the next-token loss of the whole model, less that of the
    original, in units of what it is at the start. T falls from 1/64 to 1/640 of the full rank; P counts what
    real-valued ranks store. Only mu is trained.
    """
    top = full_ranks(problem)
    first = _first(problem, top, start)
    masks = Masks(problem)
    with torch.no_grad():
        base = float(problem.measured().loss({}, 0))
        scale = max(abs(float(masks.loss(first, COLD * top, 0)) - base), 1e-3) if start != "full" else base

    def objective(ranks: Tensor, step: int) -> Tensor:
        done = step / max(1, steps - 1)
        loss = masks.loss(ranks, WARM * (COLD / WARM) ** done * top, step)
        over = stored(problem, ranks).sum() / problem.budget - 1
        growth = done**2 if start == "full" else 1.0
        return (loss - base) / scale + penalty * growth * over**2

    ranks = descend(first, top, steps, rate, objective)
    kept = stored(problem, torch.from_numpy(ranks)).numpy() / problem.sizes
    return Allocation(ranks_from_fractions(problem, kept))


def _first(problem: Problem, top: Tensor, start: str) -> Tensor:
    if start == "full":
        return top.clone()
    if start == "uniform":
        return ranks_of_fractions(problem, np.full(len(problem.items), problem.keep_ratio))
    plan = solve(problem.curves(), problem.budget).ranks
    costs = np.array([problem.cost.of(*item.shape, plan[item.path]) for item in problem.items])
    return ranks_of_fractions(problem, costs / problem.sizes)


class Masks:
    """The model with every weight's components multiplied by Fermi functions."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.probe = problem, problem.measured()
        self.factors = {item.path: self.probe.factors(item.path) for item in problem.items}

    def loss(self, ranks: Tensor, temperatures: Tensor, step: int) -> Tensor:
        """Next-token loss on one of the batches."""
        transforms: dict[str, Transform] = {}
        for item, mu, temperature in zip(self.problem.items, ranks, temperatures, strict=True):
            a, b = self.factors[item.path]
            k = torch.arange(1, len(a) + 1, dtype=torch.float64)
            missing = torch.sigmoid((k - 0.5 - mu) / temperature).to(a)
            transforms[item.path] = _without(a, b, missing)
        return self.probe.loss(transforms, step % self.probe.batches()).to("cpu", torch.float64)


def _without(a: Tensor, b: Tensor, missing: Tensor) -> Transform:
    """The output less the part of every component that is missing; biases stay as they are."""

    def transform(x: Tensor, y: Tensor, rows: slice) -> Tensor:
        return y - ((x.to(a) @ a.t()) * missing @ b[rows].t()).to(y)

    return transform
