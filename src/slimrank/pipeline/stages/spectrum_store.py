"""Read the stored spectra of a run, and compute factors from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimrank.layers.low_rank import LowRankLinear
from slimrank.linalg.forms import Form
from slimrank.linalg.lowrank import Spectrum
from slimrank.models.targets import Target
from slimrank.pipeline.units import Unit

if TYPE_CHECKING:
    from slimrank.pipeline.state import State


MAX_FILES_IN_MEMORY = 2  # that are kept in memory
OUTLINE_POINTS = 32  # of a spectrum, for a report


def outline(spectrum: Spectrum) -> dict[str, list[Any]]:
    """Return what a report draws of a spectrum: log-spaced ranks, and the relative error at each."""
    steps = torch.linspace(0, 1, OUTLINE_POINTS, dtype=torch.float64)
    ranks = sorted({round(spectrum.full_rank**step) for step in steps.tolist()})
    return {"ranks": ranks, "errors": [float(f"{spectrum.relative_error(rank):.4g}") for rank in ranks]}


class SpectrumStore:
    """The stored spectra of a state's units."""

    def __init__(self, state: State) -> None:
        self.state, self.store = state, state.store(state.chained("calibrate"))
        self._files: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {}

    def of(self, unit: Unit) -> tuple[Spectrum, dict[str, Any]]:
        """Return the spectrum of a unit, and the notes beside it."""
        tensors, about = self._file(f"block-{self._stored_under(unit):04d}")
        mine = about[unit.path]
        spectrum = Spectrum(
            values=tensors[f"{unit.path}.values"],
            basis=tensors[f"{unit.path}.basis"],
            side=mine["side"],
            dual=tensors.get(f"{unit.path}.dual"),
            beyond=mine["beyond"],
            stand_in=mine["stand_in"],
            plain_rows=mine["plain_rows"],
            notes=tuple(mine["notes"]),
        )
        return spectrum, mine

    def row(self, target: Target) -> Form:
        """Return the form on the outputs that a target was solved in; the identity if it shares a factor."""
        unit = next(unit for unit in self.state.prepared.units if target in unit.targets)
        return self.of(unit)[0].row() if len(unit.targets) == 1 else Form()

    def factors(self, unit: Unit, rank: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return A (rank x n), and B (m x rank) of each target, in float32; in float64 for a float64 weight."""
        weight = unit.weight(self.state.model, self.state.prepared.solver)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        a, b = self.of(unit)[0].factors(weight, rank, dtype)
        return a, b.split([t.shape[0] for t in unit.targets])

    def layers(self, unit: Unit, rank: int) -> dict[str, nn.Module]:
        """Make low-rank layers for the targets of a unit, ties included, in the dtype of their weights."""
        a, parts = self.factors(unit, rank)
        found: dict[str, nn.Module] = {}
        for target, part in zip(unit.targets, parts, strict=True):
            old = self.state.model.get_submodule(target.path)
            weight = old.get_parameter("weight")
            bias = None if old.bias is None else old.bias.detach()
            b = part.to(weight.device, weight.dtype).contiguous()
            layer = LowRankLinear.from_factors(a.to(weight.device, weight.dtype).contiguous(), b, bias)
            found |= dict.fromkeys((target.path, *target.ties), layer.requires_grad_(False))
        return found

    def _file(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if name not in self._files:
            while len(self._files) >= MAX_FILES_IN_MEMORY:
                self._files.pop(next(iter(self._files)))
            self._files[name] = self.store.load(name, str(self.state.prepared.solver))
        return self._files[name]

    def _stored_under(self, unit: Unit) -> int:
        return min(unit.blocks) if self.state.prepared.backwards else max(unit.blocks)
