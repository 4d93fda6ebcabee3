"""Cut factors at the planned ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.export.save import replace_linears
from slimrank.layers.dense import weight_of
from slimrank.linalg.lowrank import Spectrum
from slimrank.models.paging import page_out
from slimrank.pipeline.job import Job
from slimrank.planning import Unit
from slimrank.run import Stage


@dataclass
class Cut:
    """What cutting has come to.

    Attributes:
        rows: target -> its errors and its group, for the report.
        notes: anything unusual.
        new_biases: parameters of biases that the original model did not have.
    """

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    new_biases: int = 0


class Cutter:
    """Replaces weights, unit by unit, and keeps the originals until they are let go."""

    def __init__(self, job: Job, stage: Stage) -> None:
        self.job, self.stage = job, stage
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
        files: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {}
        for unit in now:
            name = f"block-{self._stored_under(unit):04d}"
            if name not in files:
                files[name] = self.stage.load(name, str(self.job.solver))
            self._cut(unit, *files[name])

    def _stored_under(self, unit: Unit) -> int:
        backwards = self.job.method.gathering.backward and not self.job.recipe.resident
        return min(unit.blocks) if backwards else max(unit.blocks)

    def _cut(self, unit: Unit, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        spectrum = _stored_spectrum(unit.path, tensors, about[unit.path])
        rank = self.job.plan.targets[unit.path].rank
        error = 0.0 if rank == "dense" else spectrum.relative_error(rank)
        for target in unit.targets:
            self.done.rows[target.path] = {
                "relative_error": error,
                "group": about[unit.path]["groups"][target.path],
            }
        self.done.notes += [f"{unit.path}: {note}" for note in spectrum.notes]
        if rank != "dense":
            self._replace(unit, spectrum, rank)

    def _replace(self, unit: Unit, spectrum: Spectrum, rank: int) -> None:
        layers = [self.job.model.get_submodule(t.path) for t in unit.targets]
        weight = torch.cat([weight_of(layer).to(self.job.solver) for layer in layers])
        a, b = spectrum.factors(weight, rank, torch.float64 if weight.dtype == torch.float64 else torch.float32)
        for target, layer in zip(unit.targets, layers, strict=True):
            self.originals |= {path: self.job.model.get_submodule(path) for path in (target.path, *target.ties)}
            page_out(layer)
        rows = b.split([t.shape[0] for t in unit.targets])
        members = [((t.path, *t.ties), part) for t, part in zip(unit.targets, rows, strict=True)]
        replace_linears(self.job.model, members, a)


def _stored_spectrum(path: str, tensors: dict[str, Tensor], about: dict[str, Any]) -> Spectrum:
    return Spectrum(
        values=tensors[f"{path}.values"],
        basis=tensors[f"{path}.basis"],
        side=about["side"],
        dual=tensors.get(f"{path}.dual"),
        beyond=about["beyond"],
        notes=tuple(about["notes"]),
    )
