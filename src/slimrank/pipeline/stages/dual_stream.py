"""Two streams of hidden states through the blocks: those of the original model and of the compressed model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slimrank.methods.refiner import RefineOptions
from slimrank.models.blocks import BlockRunner
from slimrank.models.contexts import swapped
from slimrank.models.reading_order import calls_of, reading_order, run_until_read
from slimrank.models.recording import Batch
from slimrank.models.residual_layers import Place, answers_of, residual_places
from slimrank.models.states import HiddenState, named, states_named
from slimrank.models.structure import without_numbers
from slimrank.pipeline.sharing import my_numbers
from slimrank.processes import processes
from slimrank.statistics.paired_inputs import StreamCollector
from slimrank.statistics.reduction import summed

if TYPE_CHECKING:
    from slimrank.pipeline.state import State


@dataclass(frozen=True)
class _Both:
    """A block in both models, as far as the sums of some layers need it.

    Attributes:
        index: its number.
        originals: module path -> original layer, of all that were compressed.
        layers: module path -> compressed layer, of those whose sums are gathered.
        places: which of these add to the residual stream, and where.
        last: whether the original stream passes through the whole block.
    """

    index: int
    originals: Mapping[str, nn.Module]
    layers: Mapping[str, nn.Module]
    places: Mapping[str, Place]
    last: bool

    def at(self, place: Place) -> list[str]:
        """Return the layers that add to the residual stream at this place."""
        return [path for path, found in self.places.items() if found == place]


class DualStream:
    """The inputs of the next block in both models, and the sums over both that refine its layers.

    Args:
        runner: computes one block of the model at a time.
        batches: the windows.
        solver: the device that sums are on.
        following: the options of refining. Without an anchor there is no original stream.
        largest: see `StreamCollector`.

    Attributes:
        original: states of the original model, one for each batch; empty without an anchor.
        compressed: those of the compressed model.
    """

    def __init__(
        self,
        runner: BlockRunner,
        batches: Sequence[Batch],
        solver: torch.device,
        following: RefineOptions,
        largest: float = 0.0,
    ) -> None:
        self.runner, self.batches, self.solver = runner, batches, solver
        self.following, self.largest = following, largest
        self.original: list[HiddenState] = []
        self.compressed: list[HiddenState] = []
        self._parts: list[range] = []  # places of batches
        self.numbers: list[int] = []  # of the batches of this process among all
        self._known: dict[str, Place | None] = {}
        self._times: Counter[str] = Counter()  # calls of a layer in one pass of its block

    @classmethod
    def of(cls, state: State, following: RefineOptions, largest: float = 0.0) -> DualStream:
        """Return the streams of a compression, over the windows that it refines on."""
        batches = state.batches("refinement") or state.batches("calibration")
        return cls(state.runner(resident=False), batches, state.prepared.solver, following, largest)

    def start(self) -> None:
        """Embed the windows of this process.

        Raises:
            RecipeError: a part has fewer batches than there are processes.
        """
        team, first, parts = processes(), 0, list[list[Batch]]()
        for part in self._dealt():
            mine = my_numbers(team, part)
            parts.append([part[number] for number in mine])
            self.numbers += [first + number for number in mine]
            first += len(part)
        self.runner.embed([batch for part in parts for batch in part])
        ends = [0, *accumulate(len(part) for part in parts)]
        self._parts = [range(*between) for between in pairwise(ends)]
        self.compressed = list(self.runner.states)
        self.original = list(self.compressed) if self.following.anchor else []

    def stages(self, index: int, paths: list[str]) -> list[list[str]]:
        """Return the layers whose sums are gathered together, in order; at least one group."""
        layers = {path: self.runner.model.get_submodule(path) for path in paths}
        run = partial(self.runner.run, index, 0, self.compressed[0])
        with self.runner.placed_block(index):
            self._times = calls_of(layers, run) if paths else Counter()
            return reading_order(layers, run) if self.following.true_sequential and paths else [paths]

    def gather(
        self, index: int, originals: Mapping[str, nn.Module], paths: list[str], last: bool
    ) -> list[StreamCollector]:
        """Gather the sums of these layers, for each part of the text.

        After the last layers of a block the original stream has passed through the block.

        Args:
            index: the block, which holds the compressed layers.
            originals: module path -> original layer.
            paths: layers to gather sums of.
            last: whether they are the block's last.
        """
        layers = {path: self.runner.model.get_submodule(path) for path in paths}
        with self.runner.placed(self.runner.blocks[index], *originals.values()):
            both = _Both(index, originals, layers, self._places(index, originals, paths), last)
            return [self._gathered(both, part) for part in self._parts]

    def step(self, index: int) -> None:
        """Take the compressed stream through the block."""
        with self.runner.placed_block(index):
            for b, state in enumerate(self.compressed):
                self.compressed[b] = self.runner.to_host(self.runner.run(index, b, state))

    def _dealt(self) -> list[Sequence[Batch]]:
        """Return the windows in batches, for each part of the text that is summed by itself."""
        if self.following.ridge != "auto":
            return [self.batches]
        halves = torch.cat([batch.input_ids for batch in self.batches]).chunk(2)
        return [[Batch(ids) for ids in half.split(len(self.batches[0].input_ids))] for half in halves]

    def _gathered(self, both: _Both, part: range) -> StreamCollector:
        """Gather the sums over these batches."""
        following = self.following
        collector = StreamCollector(
            originals={path: both.originals[path] for path in both.layers} if following.anchor else {},
            compressed=both.layers,
            anchor=following.anchor,
            stack=following.stack_of_batch,
            device=self.solver,
            adding=frozenset(both.places),
            routed=frozenset(path for kind in self.runner.experts(both.index, both.layers) for path in kind),
            largest=self.largest,
        )
        with collector:
            for b in part:
                batch = self.runner.batches[b]
                collector.begin(batch.attention_mask, batch.input_ids.shape)
                self._run(both, b, collector)
        team, device = processes(), collector.device
        collector.sums = summed(team, collector.sums, device)
        collector.lacks = summed(team, collector.lacks, device)
        return collector

    def states(self) -> dict[str, Tensor]:
        """Return the states of both streams, of this process's batches, for the store."""
        compressed = named("compressed.", self.compressed, self.numbers)
        return compressed | (named("original.", self.original, self.numbers) if self.original else {})

    def take_up(self, stored: Mapping[str, Tensor]) -> None:
        """Go on with stored states."""
        self.compressed = states_named(stored, "compressed.", self.numbers)
        if self.original:
            self.original = states_named(stored, "original.", self.numbers)

    def _run(self, both: _Both, b: int, collector: StreamCollector) -> None:
        """Run one batch through the block of both models, the original first, only as far as needed."""
        layers, originals, exits = both.layers, both.originals, both.at("exit")
        calls = list(Counter({path: self._times[path] for path in layers}).elements())
        rest = {path: self.original[b].hidden for path in both.at("entry")}  # noqa: C420  (there may be no original stream)
        run, following = partial(self.runner.run, both.index, b), self.following
        if following.anchor:
            with swapped(self.runner.model, originals), answers_of({p: originals[p] for p in exits}) as answers:
                if both.last or exits:
                    after = run(self.original[b])
                    rest |= {path: after.hidden - answers[path].view_as(after.hidden) for path in exits}
                    self.original[b] = self.runner.to_host(after) if both.last else self.original[b]
                else:
                    run_until_read([originals[path] for path in calls], partial(run, self.original[b]))
        if exits:
            with answers_of({path: layers[path] for path in exits}) as answers:
                output = run(self.compressed[b]).hidden
        elif layers:
            run_until_read([layers[path] for path in calls], partial(run, self.compressed[b]))
        for path, before in rest.items():
            now = self.compressed[b].hidden if path not in exits else output - answers[path].view_as(output)
            collector.add_lack(path, following.anchor * (before.to(now) - now))

    def _places(self, index: int, originals: Mapping[str, nn.Module], paths: list[str]) -> dict[str, Place]:
        """Find which of these layers compensate for the residual stream; the first of each role is tried."""
        if not (self.following.anchor and self.following.residual):
            return {}
        routed = {path for kind in self.runner.experts(index, paths) for path in kind}
        paths = [path for path in paths if path not in routed]
        new = {path: originals[path] for path in paths if without_numbers(path) not in self._known}
        if new:
            with swapped(self.runner.model, originals):
                entry = self.original[0].to(self.runner.device)
                found = residual_places(
                    self.runner.blocks[index], new, lambda: self.runner.run(index, 0, entry).hidden, entry.hidden
                )
            self._known |= {without_numbers(path): found.get(path) for path in new}
        places = {path: self._known[without_numbers(path)] for path in paths}
        return {path: place for path, place in places.items() if place is not None}
