"""From spectra, and measurements of the model, to the rank plan."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from slimrank.budget.additivity import additivity
from slimrank.budget.knapsack import TradeOff, trade_off
from slimrank.budget.problem import Allocation, Problem
from slimrank.pipeline.job import Job
from slimrank.pipeline.planning import search_passes
from slimrank.pipeline.probe import ModelProbe
from slimrank.pipeline.spectra import Spectra
from slimrank.progress import Forecast
from slimrank.store import Run, Stage


def allocate(job: Job, run: Run, stage: Stage) -> dict[str, Any]:
    """Find the ranks and make them the job's plan, unless it was there from the start.

    Args:
        job: its spectra are in `stage`.
        run: keeps measurements, and the allocation when it is found, so that neither is made twice.
        stage: of the spectra.

    Returns:
        What there is to report of it.
    """
    if not job.allocates:
        return {"id": job.plan.allocation}
    assert job.problem is not None
    kept = run.stage(_key(job, job.problem))
    forecast = Forecast(job.progress, search_passes(job.recipe, len(job.units)))
    with job.timed("allocate", forecast.steps):
        if not kept.has("allocation"):
            kept.save("allocation", {}, _found(job, job.problem, run, Spectra(job, stage), forecast))
        found = kept.load("allocation")[1]
        forecast.end()
    job.plan = job.plan_of(Allocation(found["ranks"]))
    job.notes += [f"allocation: {note}" for note in (*found["notes"], *_bent(job))]
    about: dict[str, Any] = found["about"]
    return about


def _key(job: Job, problem: Problem) -> dict[str, Any]:
    """Everything that the allocation depends on."""
    return {
        **job.allocation_key(),
        "allocation": job.allocator.described(),
        "items": [asdict(item) for item in problem.items],
        "budget": problem.budget,
        "multiple": problem.multiple,
        "cost": problem.form.name,
    }


def _found(job: Job, problem: Problem, run: Run, spectra: Spectra, forecast: Forecast) -> dict[str, Any]:
    """The ranks, and what there is to tell of them, as they are kept."""
    with ExitStack() as stack:
        problem = with_spectra(problem, spectra, job)
        if job.allocator.measures:
            measuring = job.allocator.measuring
            key = {**job.allocation_key(), "measuring": measuring.model_dump(exclude={"plans"})}
            probe = ModelProbe(job, spectra, run.stage(key), measuring, forecast)
            problem = replace(problem, probe=stack.enter_context(probe))
        found = job.allocator.allocate(problem)
        return {"ranks": dict(found.ranks), "notes": found.notes, "about": _about(job, problem, found)}


def _bent(job: Job) -> list[str]:
    """Options of measuring that the windows do not allow."""
    wanted = job.allocator.measuring.dropped
    if not job.allocator.measures or wanted is None or job.texts.search is None:
        return []
    found = job.allocator.measuring.positions(int(job.texts.search.shape[1]))
    return [f"of a window only {found} positions can be dropped, not {wanted}"] if found < wanted else []


def _about(job: Job, problem: Problem, found: Allocation) -> dict[str, Any]:
    about = {**job.allocator.described(), "gap": found.gap}
    if found.curves:
        about["trade_off"] = _sketch(trade_off(found.curves), float(problem.sizes.sum()))
        about["predicted"] = sum(float(c.errors[c.index(found.ranks[c.path])]) for c in found.curves)
    if found.divergence and job.allocator.measuring.plans > 1:
        about["additivity"] = asdict(additivity(problem, found.curves, job.allocator.measuring.plans))
    return about


def _sketch(path: TradeOff, whole: float) -> list[dict[str, float]]:
    """Predicted error at some sizes along the whole path."""
    sizes = [k / 20 for k in range(1, 21)]
    places = np.searchsorted(path.costs, [size * whole for size in sizes], side="right") - 1
    return [
        {"keep_ratio": size, "error": float(path.errors[place])}
        for size, place in zip(sizes, places.tolist(), strict=True)
        if place >= 0
    ]


def with_spectra(problem: Problem, spectra: Spectra, job: Job) -> Problem:
    """The problem with singular values of all its items; without energy where the metric was zero: no token that
    calibrated would miss the layer.
    """
    found = {}
    for unit in job.units:
        spectrum, _ = spectra.of(unit)
        nothing = np.zeros(min(unit.shape)), 0.0
        found[unit.path] = nothing if spectrum.stand_in else (spectrum.values.cpu().numpy(), spectrum.beyond)
    return replace(problem, spectra=found, in_loss=job.method.gathering.backward)
