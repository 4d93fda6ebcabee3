"""Refine factors after the cut, block after block, in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.layers.convert import CompressedLinear, pair_of, stored_layer
from slimrank.layers.dense import weight_of
from slimrank.linalg.regression import Regression, best_b
from slimrank.models.order import reading_order, run_until_read
from slimrank.models.paging import page_out
from slimrank.models.swap import swapped
from slimrank.models.targets import Target
from slimrank.pipeline.cutting import Cutter
from slimrank.pipeline.job import Job, hidden_states, named
from slimrank.run import Stage
from slimrank.statistics.streams import StreamCollector, StreamSums


class Refinement:
    """Two streams of hidden states through the blocks: the original model's, and the compressed model's.

    Layers of a block are solved for in the order in which they read, each with what the refined layers before it give
    it: the block runs again for each stage, as far as the layers of that stage. In the end it runs on the second stream
    once more, to pass on what the refined factors give. The first stream is there only where the target is anchored.
    """

    def __init__(self, job: Job, cutter: Cutter, stage: Stage) -> None:
        assert job.refiner is not None
        self.job, self.cutter, self.stage, self.refiner = job, cutter, stage, job.refiner
        self.anchor = job.refiner.following.anchor
        self.runner = job.runner(resident=False)

    def walk(self) -> None:
        """Cut and refine all blocks in order."""
        job, runner = self.job, self.runner
        with job.timed("cut and refine factors", len(runner)), runner.session():
            first = int(self.stage.load("streams")[1]["next"]) if self.stage.has("streams") else 0
            runner.embed(job.batches())
            self.compressed = list(runner.hidden)
            if not self.anchor:
                runner.hidden = []
            if first:
                job.progress.note(f"resuming at block {first} of {len(runner)}")
                self._take_up(first)
            for index in range(first, len(runner)):
                self._block(index)
                job.progress.step()

    def _take_up(self, first: int) -> None:
        streams, _ = self.stage.load("streams")
        count = len(self.runner.batches)
        self.compressed = hidden_states(streams, "compressed.", count)
        self.runner.hidden = hidden_states(streams, "original.", count) if self.anchor else []
        for index in range(first):
            self.cutter.cut_block(index)
            tensors, about = self.stage.load(f"refined-{index:04d}")
            for target in self._factored(index):
                if target.path not in about:
                    self._not_refined(target)
                    continue
                mine = f"{target.path}."
                self._put(target, {k.removeprefix(mine): v for k, v in tensors.items() if k.startswith(mine)})
                self.cutter.done.rows[target.path]["refined"] = about[target.path]
            self._let_go(index)
            self.job.progress.step()

    def _not_refined(self, target: Target) -> None:
        self.cutter.done.notes.append(f"{target.path}: no calibration token reached this layer: not refined")

    def _let_go(self, index: int) -> dict[str, nn.Module]:
        """The original layers of a block, tied ones of other blocks' targets included; nobody keeps them after this."""
        inside = f"{self.runner.path}.{index}."
        mine = {path: layer for path, layer in self.cutter.originals.items() if path.startswith(inside)}
        for path in mine:
            del self.cutter.originals[path]
        return mine

    def _factored(self, index: int) -> list[Target]:
        return [t for t in self.job.targets.in_block(index) if self.job.plan.targets[t.path].rank != "dense"]

    def _block(self, index: int) -> None:
        self.cutter.cut_block(index)
        targets = {t.path: t for t in self._factored(index)}
        originals = self._let_go(index)
        tensors: dict[str, Tensor] = {}
        about: dict[str, Any] = {}
        stages = self._stages(index, list(targets))
        for number, paths in enumerate(stages, 1):
            sums = self._gather(index, originals, paths, last=number == len(stages))
            for target in (targets[path] for path in paths):
                if target.path not in sums or sums[target.path].inputs.count == 0:
                    self._not_refined(target)
                    continue
                weight = weight_of(originals[target.path]).to(self.job.solver)
                new, about[target.path] = self._refined(target, weight, sums[target.path])
                tensors |= {f"{target.path}.{k}": v for k, v in new.items()}
                self._put(target, new)
                self.cutter.done.rows[target.path]["refined"] = about[target.path]
        with self.runner.placed_block(index):
            for b, hidden in enumerate(self.compressed):
                self.compressed[b] = self.runner.kept(self.runner.run(index, b, hidden))
        page_out(self.runner.blocks[index])
        if self.job.resumable:
            self._store(index, tensors, about)

    def _store(self, index: int, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        self.stage.save(f"refined-{index:04d}", tensors, about)
        original = named("original.", self.runner.hidden) if self.anchor else {}
        self.stage.save("streams", {**original, **named("compressed.", self.compressed)}, {"next": index + 1})

    def _stages(self, index: int, paths: list[str]) -> list[list[str]]:
        """Layers whose sums are gathered in one go, in order; at least one stage, for the streams to go on."""
        if not self.refiner.following.true_sequential or not paths:
            return [paths]
        layers = {path: self.job.model.get_submodule(path) for path in paths}
        with self.runner.placed_block(index):
            return reading_order(layers, lambda: self.runner.run(index, 0, self.compressed[0]))

    def _gather(
        self, index: int, originals: Mapping[str, nn.Module], paths: list[str], last: bool
    ) -> dict[str, StreamSums]:
        """Sums of these layers; after the last of a block, the original stream has gone through it."""
        job, runner = self.job, self.runner
        collector = StreamCollector(
            originals={path: originals[path] for path in paths} if self.anchor else {},
            compressed={path: job.model.get_submodule(path) for path in paths},
            anchor=self.anchor,
            stack=self.refiner.following.stack_of_batch,
            device=job.solver,
        )
        with runner.placed(runner.blocks[index], *originals.values()), collector:
            for b, batch in enumerate(runner.batches):
                collector.begin(batch.attention_mask, batch.input_ids.shape)
                if self.anchor:
                    self._run_original(index, b, originals, [] if last else paths)
                if paths:
                    layers = collector.compressed.values()
                    run_until_read(layers, partial(runner.run, index, b, self.compressed[b]))
        return collector.sums

    def _run_original(self, index: int, b: int, originals: Mapping[str, nn.Module], until: list[str]) -> None:
        """The original block, as far as these layers, or to its end if there are none."""
        run = partial(self.runner.run, index, b, self.runner.hidden[b])
        with swapped(self.job.model, originals):
            if until:
                run_until_read([originals[path] for path in until], run)
            else:
                self.runner.hidden[b] = self.runner.kept(run())

    def _refined(self, target: Target, weight: Tensor, sums: StreamSums) -> tuple[dict[str, Tensor], dict[str, float]]:
        """What the refined layer holds, cast to the dtype it is stored in, and the relative errors before and after."""
        layer: CompressedLinear = self.job.model.get_submodule(target.path)
        following = self.refiner.following
        biased = not target.ties and (following.bias == "all" or (following.bias == "existing" and target.bias))
        problem = sums.problem(weight, biased)
        if following.metric == "method":
            problem = replace(problem, row=self.cutter.spectra.row(target))
        a, b = (factor.to(weight.device) for factor in pair_of(layer))
        damped = problem.towards(weight, following.ridge)
        new = self._stored(damped, *self.refiner.refine(damped, weight, a, b))
        new_a, new_b = pair_of(new)
        product = new_b @ new_a
        if biased:
            old = 0 if layer.bias is None else layer.bias.detach().to(weight.device)
            new.set_bias((old + sums.bias_change(weight, product)).to(self.job.dtype))
        errors = {"before": _relative(problem, b @ a), "after": _relative(problem, product)}
        return new.state_dict(), errors

    def _stored(self, problem: Regression, a: Tensor, b: Tensor) -> CompressedLinear:
        """The layer of refined factors; the B of a pair is fitted again to what casting leaves of A."""
        form = self.job.plan.stored_as
        if form == "pair":
            cast = a.to(self.job.dtype)
            a, b = cast, b if torch.equal(cast.to(a), a) else best_b(problem, cast)
        return stored_layer(form, a, b, dtype=self.job.dtype)

    def _put(self, target: Target, new: Mapping[str, Tensor]) -> None:
        """Give the layer, and those tied to it, what a refined one holds; a bias that is not in it stays."""
        layers = [self.job.model.get_submodule(path) for path in (target.path, *target.ties)]
        bias = next((tensor for name, tensor in new.items() if name.endswith("bias")), None)
        if bias is not None and layers[0].bias is None:
            layers[0].set_bias(torch.empty_like(bias))
            layers[0].requires_grad_(next(layers[0].parameters()).requires_grad)
            self.cutter.done.new_biases += bias.numel()
        for layer in layers:
            held = layer.state_dict(keep_vars=True)
            for name, tensor in new.items():  # not in place: the original layer holds the same bias
                held[name].data = tensor.to(held[name], copy=True)


def _relative(problem: Any, product: Tensor) -> float:
    return (max(0.0, problem.loss(product)) / problem.energy) ** 0.5 if problem.energy > 0 else 0.0
