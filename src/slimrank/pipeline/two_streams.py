"""Two streams of hidden states through the blocks: the original model's, and the compressed model's."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from slimrank.models.order import reading_order, run_until_read
from slimrank.models.residual import Place, answers_of, residual_places
from slimrank.models.structure import without_numbers
from slimrank.models.swap import swapped
from slimrank.pipeline.job import Job
from slimrank.refine.registry import Following
from slimrank.statistics.streams import StreamCollector


class TwoStreams:
    """What enters the next block in both models, and the sums over both that layers are refined by.

    Args:
        job: knows the model; its runner computes one block at a time.
        following: how refining goes about it. Without an anchor there is no original stream.

    Attributes:
        original: hidden states of the original model, one tensor a batch; empty without an anchor.
        compressed: those of the compressed model.
    """

    def __init__(self, job: Job, following: Following) -> None:
        self.job, self.following = job, following
        self.runner = job.runner(resident=False)
        self.original: list[Tensor] = []
        self.compressed: list[Tensor] = []
        self._known: dict[str, Place | None] = {}

    def start(self) -> None:
        """Embed the calibration windows."""
        self.runner.embed(self.job.batches())
        self.compressed = self.runner.hidden
        self.original = list(self.compressed) if self.following.anchor else []

    def stages(self, index: int, paths: list[str]) -> list[list[str]]:
        """Layers whose sums are gathered in one go, in order; at least one stage, for the streams to go on."""
        if not self.following.true_sequential or not paths:
            return [paths]
        layers = {path: self.job.model.get_submodule(path) for path in paths}
        with self.runner.placed_block(index):
            return reading_order(layers, lambda: self.runner.run(index, 0, self.compressed[0]))

    def gather(self, index: int, originals: Mapping[str, nn.Module], paths: list[str], last: bool) -> StreamCollector:
        """Sums of these layers; after the last of a block, the original stream has gone through it.

        Args:
            index: the block, which holds the compressed layers.
            originals: module path -> original layer.
            paths: layers to gather sums of.
            last: whether they are the block's last.
        """
        layers = {path: self.job.model.get_submodule(path) for path in paths}
        with self.runner.placed(self.runner.blocks[index], *originals.values()):
            places = self._places(index, originals, paths)
            collector = StreamCollector(
                originals={path: originals[path] for path in paths} if self.following.anchor else {},
                compressed=layers,
                anchor=self.following.anchor,
                stack=self.following.stack_of_batch,
                device=self.job.solver,
                adding=frozenset(places),
            )
            with collector:
                for b, batch in enumerate(self.runner.batches):
                    collector.begin(batch.attention_mask, batch.input_ids.shape)
                    self._run_both(index, b, originals, layers, places, collector, last)
        return collector

    def step(self, index: int) -> None:
        """The compressed stream goes through the block."""
        with self.runner.placed_block(index):
            for b, hidden in enumerate(self.compressed):
                self.compressed[b] = self.runner.kept(self.runner.run(index, b, hidden))

    def _run_both(
        self,
        index: int,
        b: int,
        originals: Mapping[str, nn.Module],
        layers: Mapping[str, nn.Module],
        places: Mapping[str, Place],
        collector: StreamCollector,
        last: bool,
    ) -> None:
        """One batch through the block, first as it was, then as it is; no further than is needed."""
        exits = [path for path, place in places.items() if place == "exit"]
        rest = {path: self.original[b] for path, place in places.items() if place == "entry"}
        run, following = partial(self.runner.run, index, b), self.following
        if following.anchor:
            with swapped(self.job.model, originals), answers_of({p: originals[p] for p in exits}) as answers:
                if last or exits:
                    output = run(self.original[b])
                    rest |= {path: output - answers[path].view_as(output) for path in exits}
                    self.original[b] = self.runner.kept(output) if last else self.original[b]
                else:
                    run_until_read([originals[path] for path in layers], partial(run, self.original[b]))
        if exits:
            with answers_of({path: layers[path] for path in exits}) as answers:
                output = run(self.compressed[b])
        elif layers:
            run_until_read(layers.values(), partial(run, self.compressed[b]))
        for path, before in rest.items():
            now = self.compressed[b] if path not in exits else output - answers[path].view_as(output)
            collector.add_lack(path, following.anchor * (before.to(now) - now))

    def _places(self, index: int, originals: Mapping[str, nn.Module], paths: list[str]) -> dict[str, Place]:
        """Which of these layers are to make up for the residual stream, by what the first of their role does."""
        if not (self.following.anchor and self.following.residual):
            return {}
        new = {path: originals[path] for path in paths if without_numbers(path) not in self._known}
        if new:
            with swapped(self.job.model, originals):
                run = partial(self.runner.run, index, 0, self.original[0])
                entry = self.original[0].to(self.runner.device)
                found = residual_places(self.runner.blocks[index], new, run, entry)
            self._known |= {without_numbers(path): found.get(path) for path in new}
        places = {path: self._known[without_numbers(path)] for path in paths}
        return {path: place for path, place in places.items() if place is not None}
