"""Cut factors at the planned ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from slimrank.checkpoint.save import replace_linears
from slimrank.models.page_out import page_out
from slimrank.pipeline.job import Job
from slimrank.pipeline.planning import Unit
from slimrank.pipeline.spectra import Spectra, outline
from slimrank.store import Stage


@dataclass
class Cut:
    """What cutting has come to.

    Attributes:
        rows: target -> its errors and its group, for the report.
        spectra: unit -> the outline of its spectrum.
        notes: anything unusual.
        new_biases: parameters of biases that the original model did not have.
    """

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    spectra: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    new_biases: int = 0


class Cutter:
    """Replaces weights, unit by unit, and keeps the originals until they are let go."""

    def __init__(self, job: Job, stage: Stage) -> None:
        self.job, self.spectra = job, Spectra(job, stage)
        self.done = Cut()
        self.originals: dict[str, nn.Module] = {}
        self._left = list(job.units)

    def walk(self) -> None:
        """Cut all blocks in order."""
        blocks = sorted({t.block for t in self.job.targets})
        with self.job.timed("cut factors", len(blocks)):
            for index in blocks:
                self.cut_block(index)
                self.originals.clear()
                self.job.progress.step()

    def cut_block(self, index: int) -> None:
        """Cut every unit that has a target in this block."""
        now = [u for u in self._left if index in u.blocks]
        self._left = [u for u in self._left if index not in u.blocks]
        for unit in now:
            self._cut(unit)

    def _cut(self, unit: Unit) -> None:
        spectrum, about = self.spectra.of(unit)
        rank = self.job.plan.targets[unit.path].rank
        error = 0.0 if rank == "dense" else spectrum.relative_error(rank)
        for target in unit.targets:
            self.done.rows[target.path] = {"relative_error": error, "group": about["groups"][target.path]}
        self.done.spectra[unit.path] = outline(spectrum)
        self.done.notes += [f"{unit.path}: {note}" for note in spectrum.notes]
        if rank != "dense":
            self._replace(unit, rank)

    def _replace(self, unit: Unit, rank: int) -> None:
        a, parts = self.spectra.factors(unit, rank)
        for target in unit.targets:
            self.originals |= {path: self.job.model.get_submodule(path) for path in (target.path, *target.ties)}
            page_out(self.job.model.get_submodule(target.path))
        members = [((t.path, *t.ties), part) for t, part in zip(unit.targets, parts, strict=True)]
        replace_linears(self.job.model, members, a, self.job.plan.stored_as)
