"""Refine factors after the cut, block after block, in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.layers.convert import CompressedLinear, pair_of, stored_layer
from slimrank.layers.dense import weight_of
from slimrank.linalg.forms import Form
from slimrank.linalg.regression import Regression, best_b
from slimrank.models.paging import page_out
from slimrank.models.targets import Target
from slimrank.pipeline.cutting import Cutter
from slimrank.pipeline.job import Job, hidden_states, named
from slimrank.pipeline.two_streams import TwoStreams
from slimrank.run import Stage
from slimrank.statistics.lack import LackSums
from slimrank.statistics.streams import StreamSums


class Refinement:
    """Cuts the blocks in order and refines the factors of each, on both streams.

    Layers of a block are solved for in the order in which they read, each with what the refined layers before it give
    it: the block runs again for each stage, as far as the layers of that stage. In the end it runs on the second stream
    once more, to pass on what the refined factors give.
    """

    def __init__(self, job: Job, cutter: Cutter, stage: Stage) -> None:
        assert job.refiner is not None
        self.job, self.cutter, self.stage, self.refiner = job, cutter, stage, job.refiner
        self.streams = TwoStreams(job, job.refiner.following)
        self.runner = self.streams.runner

    def walk(self) -> None:
        """Cut and refine all blocks in order."""
        job, runner = self.job, self.runner
        with job.timed("cut and refine factors", len(runner)), runner.session():
            first = int(self.stage.load("streams")[1]["next"]) if self.stage.has("streams") else 0
            self.streams.start()
            if first:
                job.progress.note(f"resuming at block {first} of {len(runner)}")
                self._take_up(first)
            for index in range(first, len(runner)):
                self._block(index)
                job.progress.step()

    def _take_up(self, first: int) -> None:
        streams, _ = self.stage.load("streams")
        count = len(self.runner.batches)
        self.streams.compressed = hidden_states(streams, "compressed.", count)
        if self.streams.original:
            self.streams.original = hidden_states(streams, "original.", count)
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
        stages = self.streams.stages(index, list(targets))
        for number, paths in enumerate(stages, 1):
            gathered = self.streams.gather(index, originals, paths, last=number == len(stages))
            for target in (targets[path] for path in paths):
                if target.path not in gathered.sums or gathered.sums[target.path].inputs.count == 0:
                    self._not_refined(target)
                    continue
                weight = weight_of(originals[target.path]).to(self.job.solver)
                sums, lack = gathered.sums[target.path], gathered.lacks.get(target.path)
                new, about[target.path] = self._refined(target, weight, sums, lack)
                tensors |= {f"{target.path}.{k}": v for k, v in new.items()}
                self._put(target, new)
                self.cutter.done.rows[target.path]["refined"] = about[target.path]
        self.streams.step(index)
        page_out(self.runner.blocks[index])
        if self.job.resumable:
            self._store(index, tensors, about)

    def _store(self, index: int, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        self.stage.save(f"refined-{index:04d}", tensors, about)
        both = {**named("original.", self.streams.original), **named("compressed.", self.streams.compressed)}
        self.stage.save("streams", both, {"next": index + 1})

    def _refined(
        self, target: Target, weight: Tensor, sums: StreamSums, lack: LackSums | None
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """What the refined layer holds, cast to the dtype it is stored in, and the relative errors before and after."""
        layer: CompressedLinear = self.job.model.get_submodule(target.path)
        following = self.refiner.following
        biased = not target.ties and (following.bias == "all" or (following.bias == "existing" and target.bias))
        row = self.cutter.spectra.row(target) if self.refiner.in_metric else Form()
        if row.seen and lack is not None:
            self._residual_stays(target)
            lack = None
        problem = replace(sums.problem(weight, biased, lack), row=row)
        a, b = (factor.to(weight.device) for factor in pair_of(layer))
        damped = problem.towards(weight, following.ridge)
        new = self._stored(damped, *self.refiner.refine(damped, weight, a, b))
        new_a, new_b = pair_of(new)
        product = new_b @ new_a
        if biased:
            old = 0 if layer.bias is None else layer.bias.detach().to(weight.device)
            new.set_bias((old + sums.bias_change(weight, product, lack)).to(self.job.dtype))
        errors = {"before": _relative(problem, b @ a), "after": _relative(problem, product)}
        return new.state_dict(), errors

    def _residual_stays(self, target: Target) -> None:
        self.cutter.done.notes.append(
            f"{target.path}: more outputs than inputs: it does not make up for the residual stream"
        )

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
