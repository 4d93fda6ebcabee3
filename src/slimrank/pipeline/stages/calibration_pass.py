"""What all passes over the calibration text share: collectors, units with missing members, and the store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slimrank.errors import NonFiniteError
from slimrank.linalg.lowrank import Spectrum
from slimrank.methods.decomposer import DECOMPOSERS
from slimrank.models.blocks import BlockRunner
from slimrank.models.states import HiddenState, named
from slimrank.models.targets import Target
from slimrank.pipeline.sharing import my_numbers, my_units, team_of
from slimrank.pipeline.stages.statistics_cache import StatisticsCache
from slimrank.pipeline.units import Unit
from slimrank.processes import processes
from slimrank.statistics.collector import Collector
from slimrank.statistics.experts import UNREACHED, shrink_rare_experts
from slimrank.statistics.layer_statistics import LayerStatistics
from slimrank.statistics.reduction import summed
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
        gathering = state.prepared.choices.method.gathering
        self.team = team_of(gathering)
        batches = state.batches("calibration") if gathering.calibrates else []
        self.numbers = my_numbers(self.team, batches)
        self.batches = [batches[number] for number in self.numbers]

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
        if self.team.count > 1 and self.batches:
            collector.statistics = summed(self.team, collector.statistics, collector.device)
            collector.leaders = _merged(self.team.all(collector.leaders))
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
        for unit in my_units(ready, processes()):
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
        for target in (target for unit in ready for target in unit.targets):
            self.gathered.pop(target.path, None)
        self.store.save_parts(f"block-{index:04d}", tensors, _merged(processes().all(about)))

    def save_states(self, name: str, states: Sequence[HiddenState], about: dict[str, Any] | None = None) -> None:
        """Store the states of the batches of all processes."""
        self.store.save_parts(name, named("", states, self.numbers if states else ()), about)

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


def _merged(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}


def alone(targets: Iterable[Target]) -> frozenset[str]:
    """Return the targets of a block without a sibling of equal input width; no other layer can share their input."""
    places = {t.path: (t.path.rpartition(".")[0], t.shape[1]) for t in targets}
    count = Counter(places.values())
    return frozenset(path for path, place in places.items() if count[place] == 1)
