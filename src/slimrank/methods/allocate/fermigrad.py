"""Ranks by gradient descent: Fermi functions truncate the components of every weight softly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from slimrank.budget.curves import Floats
from slimrank.budget.knapsack import solve
from slimrank.budget.problem import Allocation, Problem, Transform
from slimrank.budget.proportional import ranks_from_fractions
from slimrank.budget.ranks import Rank
from slimrank.methods.allocate.spectrum import spectral_curves
from slimrank.methods.allocator import allocator
from slimrank.methods.soft_ranks import (
    best_of,
    descend,
    finite,
    full_ranks,
    kept_fractions,
    ranks_of_fractions,
    stored,
)

Steps = Annotated[int, Field(ge=1, description="Steps of the descent, each on one batch of search windows.")]
Rate = Annotated[float, Field(gt=0, le=1, description="Size of a step, as a fraction of the full rank.")]
Penalty = Annotated[float, Field(gt=0, description="Weight of the squared relative distance from the budget.")]
Start = Annotated[Literal["spectrum", "uniform"], Field(description="Begin at the plan of that allocation.")]
PASSES = 7.0  # as long as a loss and its gradient take
WARM, COLD = 1 / 64, 1 / 640  # temperatures, as fractions of the full rank
LEAST = 1e-2  # of the median weight of all layers: what is less, or negative, is noise of the batches


@allocator(
    id="fermigrad",
    title="Gradient descent on soft ranks under a penalty on the size",
    paper="FermiGrad, arXiv 2512.03062",
    needs=["spectra", "gradient"],
    passes=lambda options, layers, batches: PASSES * (options["steps"] + batches) / batches + 4,
    gradient_passes=PASSES,
)
def fermigrad(
    problem: Problem, *, steps: Steps = 60, rate: Rate = 0.005, penalty: Penalty = 100.0, start: Start = "spectrum"
) -> Allocation:
    """Minimise loss(f) + penalty ((P - budget) / budget)^2 over mu, f_k = 1 / (1 + exp((k - 1/2 - mu) / T)).

    Component k of a layer is multiplied by f_k; the loss is the next-token loss of the whole model, less that of the
    original, in units of what it is at the start. T falls from 1/64 to 1/640 of the full rank; P counts what
    real-valued ranks store. Only mu is trained. Of mu as ranks, the knapsack's plan for the slopes of the loss at mu,
    and the start, the plan of least measured divergence is taken.
    """
    top = full_ranks(problem)
    begin = _plan(problem, start)
    first = ranks_of_fractions(problem, _costs(problem, begin) / problem.sizes)
    masks = Masks(problem)
    with torch.no_grad():
        base = float(finite(problem.measured().loss({}, 0), "of the original"))
        scale = max(abs(float(finite(masks.loss(first, COLD * top, 0), "at the start")) - base), 1e-3)

    def objective(ranks: Tensor, step: int) -> Tensor:
        temperatures = WARM * (COLD / WARM) ** (step / max(1, steps - 1)) * top
        over = stored(problem, ranks).sum() / problem.budget - 1
        return (masks.loss(ranks, temperatures, step) - base) / scale + penalty * over**2

    ranks = descend(first, top, steps, rate, objective)
    slopes = solve(*problem.in_units(problem.curves(worths(masks, ranks)))).ranks
    rounded = ranks_from_fractions(problem, kept_fractions(problem, ranks))
    best = best_of(problem, {"descent": rounded, "slopes": slopes, "start": begin})
    return replace(best, curves=tuple(spectral_curves(problem)))


def _plan(problem: Problem, start: str) -> Mapping[str, Rank]:
    if start == "uniform":
        return ranks_from_fractions(problem, np.zeros(len(problem.items)))
    return solve(*problem.in_units(spectral_curves(problem))).ranks


def _costs(problem: Problem, plan: Mapping[str, Rank]) -> Floats:
    return np.array([problem.bits(item, plan[item.path]) for item in problem.items], dtype=np.float64)


class Masks:
    """The model with every weight's components multiplied by Fermi functions."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.probe = problem, problem.measured()
        self.factors = {item.path: self.probe.factors(item.path) for item in problem.items}

    def loss(self, ranks: Tensor, temperatures: Tensor, step: int) -> Tensor:
        """Return the next-token loss on one of the batches."""
        transforms: dict[str, Transform] = {}
        for item, mu, temperature in zip(self.problem.items, ranks, temperatures, strict=True):
            a, b = self.factors[item.path]
            weights = missing(mu, temperature, len(a)).to(a.dtype).to(a.device)  # first the dtype: mps has no float64
            transforms[item.path] = _without(a, b, weights)
        return self.probe.loss(transforms, step % self.probe.batches()).cpu().double()


def missing(mu: Tensor, temperature: Tensor, count: int) -> Tensor:
    """Return 1 - f_k of the first components, float64."""
    k = torch.arange(1, count + 1, dtype=torch.float64)
    return torch.sigmoid((k - 0.5 - mu) / temperature)


def worths(masks: Masks, ranks: Floats) -> dict[str, float]:
    """Return the worth of each layer's squared error at these ranks: d loss / d mu over d (squared error) / d mu.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
    """
    mu = torch.from_numpy(ranks).clone().requires_grad_()
    temperatures = WARM * full_ranks(masks.problem)
    by_error = torch.autograd.grad(_squared_error(masks.problem, mu, temperatures), mu)[0].numpy()
    by_loss = np.zeros(len(ranks))
    for batch in range(masks.probe.batches()):
        with torch.enable_grad():
            loss = finite(masks.loss(mu, temperatures, batch), f"of batch {batch} after the descent")
        by_loss += torch.autograd.grad(loss, mu)[0].numpy()
    worth = np.divide(by_loss, by_error, out=np.zeros(len(ranks)), where=by_error != 0)
    worth = np.maximum(worth, LEAST * np.median(np.abs(worth)))
    return dict(zip([item.path for item in masks.problem.items], worth.tolist(), strict=True))


@torch.enable_grad()
def _squared_error(problem: Problem, mu: Tensor, temperatures: Tensor) -> Tensor:
    """Sum over layers and components of sigma_k^2 (1 - f_k)^2."""
    total = torch.zeros((), dtype=torch.float64)
    for item, m, temperature in zip(problem.items, mu, temperatures, strict=True):
        values = torch.from_numpy(problem.spectra[item.path][0])
        total = total + (values * missing(m, temperature, len(values))).square().sum()
    return total


def _without(a: Tensor, b: Tensor, missing: Tensor) -> Transform:
    """Subtract the missing part of every component from the output; biases do not change."""

    def transform(x: Tensor, y: Tensor, rows: slice) -> Tensor:
        return y - ((x.to(a) @ a.t()) * missing @ b[rows].t()).to(y)

    return transform
