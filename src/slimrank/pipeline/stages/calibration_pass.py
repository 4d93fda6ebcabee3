"""What all passes over the calibration text share: collectors, units with missing members, and the store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slimrank.errors import NonFiniteError
from slimrank.linalg.lowrank import Spectrum
from slimrank.methods.decomposer import DECOMPOSERS
from slimrank.models.blocks import BlockRunner
from slimrank.models.targets import Target
from slimrank.pipeline.stages.statistics_cache import StatisticsCache
from slimrank.pipeline.units import Unit
from slimrank.statistics.collector import Collector
from slimrank.statistics.experts import UNREACHED, shrink_rare_experts
from slimrank.statistics.layer_statistics import LayerStatistics
from slimrank.statistics.routing import Routing
from slimrank.store import Store

if TYPE_CHECKING:
    from slimrank.pipeline.state import State


class CalibrationPass(ABC):
    """What all passes share: collectors, units with missing members, and the store."""

    def __init__(self, state: State, store: Store, cache: StatisticsCache | None) -> None:
        self.state, self.store, self.cache = state, store, cache
        self.runner: BlockRunner = state.runner(state.prepared.recipe.resident)
        self.gathered: dict[str, LayerStatistics] = {}
        self.leaders: dict[str, str] = {}
        self.waiting = list(state.prepared.units)

    @abstractmethod
    def run(self) -> None:
        """Gather all statistics, and solve and store every unit."""

    def collector(self, index: int) -> Collector:
        """Make a collector for the targets of a block."""
        state, targets = self.state, self.state.prepared.targets.in_block(index)
        layers = {t.path: state.model.get_submodule(t.path) for t in targets}
        routed = frozenset(path for kind in self.runner.experts(index, layers) for path in kind)
        own, routing = alone(targets) - routed, Routing.among(state.model, routed)
        ranks = state.plan.factored()
        return Collector(
            layers,
            state.prepared.choices.method.gathering,
            state.prepared.solver,
            own,
            ranks,
            routed=routed,
            routing=routing,
        )

    def take(self, collector: Collector, index: int) -> None:
        """Hold the statistics that a collector gathered in block `index` until they are used."""
        needs = collector.gathering.needs
        if needs & {"column", "gram"}:
            shapes = {target.path: target.shape for target in self.state.prepared.targets.in_block(index)}
            kinds = [{path: shapes[path] for path in kind} for kind in self.runner.experts(index, shapes)]
            shrink_rare_experts(collector.statistics, kinds, needs)
        if self.cache is not None:
            self.cache.save(index, collector.statistics, collector.leaders, collector.gathering)
        self.gathered |= collector.statistics
        self.leaders |= collector.leaders

    def solve_ready(self, index: int, done: set[int]) -> None:
        """Solve and store every unit whose blocks are all done, under block `index`."""
        ready = [u for u in self.waiting if u.blocks <= done]
        self.waiting = [u for u in self.waiting if not u.blocks <= done]
        tensors: dict[str, Tensor] = {}
        about: dict[str, Any] = {}
        for unit in ready:
            spectrum = self._solve(unit)
            tensors[f"{unit.path}.values"] = spectrum.values.cpu()
            tensors[f"{unit.path}.basis"] = spectrum.basis.to("cpu", torch.float32)
            if spectrum.dual is not None:
                tensors[f"{unit.path}.dual"] = spectrum.dual.to("cpu", torch.float32)
            about[unit.path] = {
                "side": spectrum.side,
                "beyond": spectrum.beyond,
                "stand_in": spectrum.stand_in,
                "plain_rows": spectrum.plain_rows,
                "notes": spectrum.notes,
                "groups": {t.path: self.leaders.get(t.path, t.path) for t in unit.targets},
            }
            for target in unit.targets:
                self.gathered.pop(target.path, None)
        self.store.save(f"block-{index:04d}", tensors, about)

    def _solve(self, unit: Unit) -> Spectrum:
        method, solver = self.state.prepared.choices.method, self.state.prepared.solver
        weight = unit.weight(self.state.model, solver)
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError(f"NaN or infinity in the weight of layer '{unit.path}'.", "check the checkpoint")
        if not method.gathering.calibrates:
            return method.solve(weight, LayerStatistics(unit.shape))
        parts = [self.gathered[t.path] for t in unit.targets if t.path in self.gathered]
        if not parts or all(part.tokens == 0 and part.inputs is None for part in parts):
            plain = DECOMPOSERS.get("svd").solve(weight, LayerStatistics(unit.shape))
            return replace(
                plain, stand_in=True, notes=(*plain.notes, "no calibration token reached this layer: plain SVD instead")
            )
        statistics = parts[0]
        for part in parts[1:]:
            statistics = statistics.merged(part)
        solved = method.solve(weight, statistics)
        solved = replace(solved, notes=tuple(dict.fromkeys((*solved.notes, *statistics.notes))))
        if all(UNREACHED in part.notes for part in parts):
            return replace(solved, stand_in=True, notes=tuple(dict.fromkeys((*solved.notes, UNREACHED))))
        return solved


def alone(targets: Iterable[Target]) -> frozenset[str]:
    """Return the targets of a block without a sibling of equal input width; no other layer can share their input."""
    places = {t.path: (t.path.rpartition(".")[0], t.shape[1]) for t in targets}
    count = Counter(places.values())
    return frozenset(path for path, place in places.items() if count[place] == 1)
