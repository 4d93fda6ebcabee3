"""From spectra, and measurements of the model, to the rank plan."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from slimrank.allocate.problem import Allocation, Problem
from slimrank.pipeline.job import Job
from slimrank.pipeline.probe import ModelProbe
from slimrank.pipeline.spectra import Spectra
from slimrank.run import Run, Stage


def allocate(job: Job, run: Run, stage: Stage) -> Allocation | None:
    """Find the ranks and make them the job's plan; None where the plan was there from the start.

    Args:
        job: its spectra are in `stage`.
        run: keeps measurements, so that they are not made twice.
        stage: of the spectra.
    """
    if not job.allocates:
        return None
    assert job.problem is not None
    spectra = Spectra(job, stage)
    key = {**job.allocation_key(), "measuring": job.allocator.measuring.model_dump()}
    with job.timed("allocate", 1), ExitStack() as stack:
        problem = with_spectra(job.problem, spectra, job)
        if job.allocator.measures:
            probe = ModelProbe(job, spectra, run.stage(key), job.allocator.measuring)
            problem = replace(problem, probe=stack.enter_context(probe))
        found = job.allocator.allocate(problem)
        job.progress.step()
    job.plan = job.plan_of(found)
    job.notes += [f"allocation: {note}" for note in found.notes]
    return found


def with_spectra(problem: Problem, spectra: Spectra, job: Job) -> Problem:
    """The problem with singular values of all its items."""
    found = {}
    for unit in job.units:
        spectrum, _ = spectra.of(unit)
        found[unit.path] = (spectrum.values.cpu().numpy(), spectrum.beyond)
    return replace(problem, spectra=found)
