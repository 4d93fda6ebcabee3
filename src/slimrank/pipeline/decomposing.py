"""Calibrate and decompose: spectra of all targets into the store, block after block.

Three ways, by what the method needs: forwards; forwards and then backwards, each block's forward computed again; or,
for gradients of a resident model, batch after batch through the whole model. A fourth, where another method has
gathered everything already: from statistics that were kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from slimrank.errors import NonFiniteError
from slimrank.layers.dense import weight_of
from slimrank.linalg.lowrank import Spectrum
from slimrank.methods.decomposer import DECOMPOSERS
from slimrank.models.blocks import BlockRunner
from slimrank.models.gradients import loss_gradients, step_back, whole_model_gradients
from slimrank.models.page_out import page_out
from slimrank.models.states import State, named, states_named
from slimrank.models.structure import find_blocks
from slimrank.models.targets import Target
from slimrank.pipeline.job import Job
from slimrank.pipeline.kept import KeptStatistics
from slimrank.pipeline.planning import Unit
from slimrank.statistics.catalogue import Need
from slimrank.statistics.collector import Collector
from slimrank.statistics.experts import UNREACHED, lean_on_each_other
from slimrank.statistics.layer_statistics import LayerStatistics
from slimrank.statistics.routing import Routing
from slimrank.store import Stage


def is_decomposed(job: Job, stage: Stage) -> bool:
    """Whether the spectra of all targets are in the store."""
    return all(stage.has(f"block-{index:04d}") for index in range(len(find_blocks(job.model)[1])))


def decompose(job: Job, stage: Stage, kept: KeptStatistics | None = None) -> None:
    """Spectra of all targets into the store; finished blocks are not done again.

    Args:
        job: knows model, text and method.
        stage: where spectra are stored.
        kept: statistics of other methods over the same text, which this one's are added to; if all that it needs is
            there the text is not read.
    """
    gathering = job.method.gathering
    sources = kept.sources(gathering) if kept is not None else None
    if kept is not None and sources is not None:
        _FromKept(job, stage, kept, sources).walk()
    elif not gathering.backward:
        _Forwards(job, stage, kept).walk()
    elif job.recipe.resident:
        _WholeModel(job, stage, kept).walk()
    else:
        _Backwards(job, stage, kept).walk()


class _Walk(ABC):
    """What all ways share: collectors, units that wait for their last member, and the store."""

    def __init__(self, job: Job, stage: Stage, kept: KeptStatistics | None) -> None:
        self.job, self.stage, self.kept = job, stage, kept
        self.runner: BlockRunner = job.runner(job.recipe.resident)
        self.gathered: dict[str, LayerStatistics] = {}
        self.leaders: dict[str, str] = {}
        self.waiting = list(job.units)

    @abstractmethod
    def walk(self) -> None:
        """Do all of it."""

    def collector(self, index: int) -> Collector:
        """A collector for the targets of a block."""
        job, targets = self.job, self.job.targets.in_block(index)
        layers = {t.path: job.model.get_submodule(t.path) for t in targets}
        routed = frozenset(path for kind in self.runner.experts(index, layers) for path in kind)
        own, routing = alone(targets) - routed, Routing.among(job.model, routed)
        ranks = job.plan.factored()
        return Collector(layers, job.method.gathering, job.solver, own, ranks, routed=routed, routing=routing)

    def take(self, collector: Collector, index: int) -> None:
        """Keep what a collector has gathered in block `index` until it is used."""
        needs = collector.gathering.needs
        if needs & {"column", "gram"}:
            shapes = {target.path: target.shape for target in self.job.targets.in_block(index)}
            kinds = [{path: shapes[path] for path in kind} for kind in self.runner.experts(index, shapes)]
            lean_on_each_other(collector.statistics, kinds, needs)
        if self.kept is not None:
            self.kept.save(index, collector.statistics, collector.leaders, collector.gathering)
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
        self.stage.save(f"block-{index:04d}", tensors, about)

    def _solve(self, unit: Unit) -> Spectrum:
        method, solver = self.job.method, self.job.solver
        weight = torch.cat([weight_of(self.job.model.get_submodule(t.path)).to(solver) for t in unit.targets])
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


class _Forwards(_Walk):
    """For methods that need no gradients, or no text at all."""

    def walk(self) -> None:
        """Block after block; hidden states are stored whenever no unit waits for a later block."""
        runner, job = self.runner, self.job
        with job.timed("calibrate and decompose", len(runner)), runner.session():
            first = _finished(self.stage, len(runner))
            self.waiting = [u for u in self.waiting if max(u.blocks) >= first]
            _resume_note(job, first, len(runner))
            if first < len(runner):
                self._start(first)
            for index in range(first, len(runner)):
                self._block(index)
                page_out(runner.blocks[index])
                job.progress.step()

    def _start(self, first: int) -> None:
        job, runner = self.job, self.runner
        runner.embed(job.batches() if job.method.gathering.calibrates else [])
        page_out(job.model)
        if first and runner.batches:
            stored, _ = self.stage.load("hidden", str(job.device) if runner.resident else "cpu")
            runner.states = states_named(stored, "", len(runner.batches))

    def _block(self, index: int) -> None:
        runner = self.runner
        with runner.placed_block(index):
            collector = self.collector(index)
            with collector if runner.batches else nullcontext():
                runner.step(index, lambda batch: collector.begin(batch.attention_mask, batch.input_ids.shape))
            self.take(collector, index)
            self.solve_ready(index, set(range(index + 1)))
        if self.job.resumable and not any(min(u.blocks) <= index for u in self.waiting):
            self.stage.save("hidden", named("", runner.states), {"next": index + 1})


class _Backwards(_Walk):
    """For methods that need gradients: the inputs of every block are stored, then blocks are taken from the last."""

    def walk(self) -> None:
        """Forwards to the loss, and back."""
        runner, job = self.runner, self.job
        with job.timed("calibrate and decompose", 2 * len(runner)), runner.session():
            last = int(self.stage.load("gradients")[1]["next"]) if self.stage.has("gradients") else len(runner)
            self.waiting = [u for u in self.waiting if min(u.blocks) < last]
            if last:
                runner.embed(job.batches())
                page_out(job.model)
                gradients = self._forwards(last)
                for index in reversed(range(last)):
                    self._block(index, gradients)
                    page_out(runner.blocks[index])
                    job.progress.step()

    def _forwards(self, last: int) -> list[State]:
        """Store the inputs of blocks up to `last`; the gradients by its inputs (of the loss, after the last block)."""
        runner, job, stage = self.runner, self.job, self.stage
        _resume_note(job, len(runner) - last, len(runner))
        top = last if last == len(runner) else last - 1
        done = max((i for i in range(top + 1) if stage.has(f"input-{i:04d}")), default=None)
        if done is None:
            stage.save("input-0000", named("", runner.states))
        else:
            runner.states = self._input(done)
        for index in range(done or 0, top):
            runner.step(index)
            page_out(runner.blocks[index])
            stage.save(f"input-{index + 1:04d}", named("", runner.states))
            job.progress.step()
        if last < len(runner):
            return states_named(stage.load("gradients")[0], "", len(runner.batches))
        gradients = loss_gradients(runner, runner.hidden)
        runner.states = []
        stage.save("gradients", named("", gradients), {"next": last})
        return gradients

    def _input(self, index: int) -> list[State]:
        tensors, _ = self.stage.load(f"input-{index:04d}")
        return states_named(tensors, "", len(self.runner.batches))

    def _block(self, index: int, gradients: list[State]) -> None:
        runner = self.runner
        with runner.placed_block(index):
            collector = self.collector(index)
            with collector:
                step_back(
                    runner,
                    index,
                    self._input(index),
                    gradients,
                    lambda batch: collector.begin(batch.attention_mask, batch.input_ids.shape),
                )
            self.take(collector, index)
            self.solve_ready(index, set(range(index, len(runner))))
        if not any(max(u.blocks) >= index for u in self.waiting):
            self.stage.save("gradients", named("", gradients) if index else {}, {"next": index})
            for later in range(index, len(runner) + 1):
                self.stage.drop(f"input-{later:04d}")


class _WholeModel(_Walk):
    """For gradients of a model that is resident: nothing is computed twice, all statistics are held at once."""

    def walk(self) -> None:
        """All batches, then all blocks."""
        runner, job, blocks = self.runner, self.job, len(self.runner)
        with job.timed("calibrate and decompose", blocks + len(job.batches())), runner.session():
            if all(self.stage.has(f"block-{i:04d}") for i in range(blocks)):
                return
            runner.batches = list(job.batches())
            collectors = [self.collector(i) for i in range(blocks)]

            def begin(batch: Any) -> None:
                for collector in collectors:
                    collector.begin(batch.attention_mask, batch.input_ids.shape)

            with ExitStack() as stack:
                for collector in collectors:
                    stack.enter_context(collector)
                for _ in whole_model_gradients(runner, begin):
                    job.progress.step()
            for index, collector in enumerate(collectors):
                self.take(collector, index)
                self.solve_ready(index, set(range(index + 1)))
                job.progress.step()


class _FromKept(_Walk):
    """For methods whose statistics are there already: nothing is run."""

    def __init__(self, job: Job, stage: Stage, kept: KeptStatistics, sources: Sequence[Need]) -> None:
        super().__init__(job, stage, kept)
        self.stored, self.sources = kept, sources

    def walk(self) -> None:
        """Every block whose spectra are not stored yet, in the order in which they would have been gathered."""
        job, blocks = self.job, len(self.runner)
        backwards = job.method.gathering.backward and not job.recipe.resident
        missing = {index for index in range(blocks) if not self.stage.has(f"block-{index:04d}")}
        if missing and any(len(unit.blocks) > 1 for unit in job.units):
            missing = set(range(blocks))
        self.waiting = [unit for unit in self.waiting if unit.blocks & missing]
        with job.timed("calibrate and decompose", blocks):
            for index in reversed(range(blocks)) if backwards else range(blocks):
                if index in missing:
                    self._block(index, backwards)
                job.progress.step()

    def _block(self, index: int, backwards: bool) -> None:
        method, ranks = self.job.method, self.job.plan.factored()
        statistics, leaders = self.stored.load(index, self.sources, method.gathering, ranks)
        self.gathered |= statistics
        self.leaders |= leaders
        self.solve_ready(index, set(range(index, len(self.runner)) if backwards else range(index + 1)))


def alone(targets: Iterable[Target]) -> frozenset[str]:
    """Targets of a block that have no sibling of the same input width, so that no other can read their input."""
    places = {t.path: (t.path.rpartition(".")[0], t.shape[1]) for t in targets}
    count = Counter(places.values())
    return frozenset(path for path, place in places.items() if count[place] == 1)


def _finished(stage: Stage, blocks: int) -> int:
    """Blocks whose spectra are stored, and whose outputs are stored as the next block's inputs."""
    done = int(stage.load("hidden")[1]["next"]) if stage.has("hidden") else 0
    return done if all(stage.has(f"block-{i:04d}") for i in range(done)) and done <= blocks else 0


def _resume_note(job: Job, done: int, blocks: int) -> None:
    if done:
        job.progress.note(f"resuming at block {done} of {blocks}")
        job.progress.step(done)
