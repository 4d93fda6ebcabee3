"""Refine factors after the cut, block after block, in closed form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.layers.dense import weight_of
from slimrank.layers.low_rank import LowRankLinear
from slimrank.linalg.regression import best_b
from slimrank.models.paging import page_out
from slimrank.models.targets import Target
from slimrank.pipeline.cutting import Cutter
from slimrank.pipeline.job import Job, hidden_states, named
from slimrank.run import Stage
from slimrank.statistics.streams import StreamCollector, StreamSums


class Refinement:
    """Two streams of hidden states through the blocks: the original model's, and the compressed model's.

    Each block runs once on the first (only where the target is anchored in it) and twice on the second: to gather
    statistics with factors as they were cut, and to pass on what the refined factors give.
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
                self._put(target, {k: tensors.get(f"{target.path}.{k}") for k in ("A", "B", "bias")})
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
        targets = self._factored(index)
        originals = self._let_go(index)
        sums = self._gather(index, originals, [t.path for t in targets])
        tensors: dict[str, Tensor] = {}
        about: dict[str, Any] = {}
        for target in targets:
            if target.path not in sums or sums[target.path].inputs.count == 0:
                self._not_refined(target)
                continue
            weight = weight_of(originals[target.path]).to(self.job.solver)
            new, about[target.path] = self._refined(target, weight, sums[target.path])
            tensors |= {f"{target.path}.{k}": v for k, v in new.items() if v is not None}
            self._put(target, new)
            self.cutter.done.rows[target.path]["refined"] = about[target.path]
        with self.runner.placed_block(index):
            for b, hidden in enumerate(self.compressed):
                self.compressed[b] = self.runner.kept(self.runner.run(index, b, hidden))
        page_out(self.runner.blocks[index])
        if self.job.resumable:
            self.stage.save(f"refined-{index:04d}", tensors, about)
            original = named("original.", self.runner.hidden) if self.anchor else {}
            self.stage.save("streams", {**original, **named("compressed.", self.compressed)}, {"next": index + 1})

    def _gather(self, index: int, originals: Mapping[str, nn.Module], paths: list[str]) -> dict[str, StreamSums]:
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
                    with _swapped(job.model, originals):
                        runner.hidden[b] = runner.kept(runner.run(index, b, runner.hidden[b]))
                runner.run(index, b, self.compressed[b])
        return collector.sums

    def _refined(
        self, target: Target, weight: Tensor, sums: StreamSums
    ) -> tuple[dict[str, Tensor | None], dict[str, float]]:
        """New factors and bias, cast to the dtype they are stored in, and the relative errors before and after."""
        layer: LowRankLinear = self.job.model.get_submodule(target.path)
        following = self.refiner.following
        biased = not target.ties and (following.bias == "all" or (following.bias == "existing" and target.bias))
        problem = sums.problem(weight, biased)
        a, b = (w.detach().to(weight.device, torch.float64) for w in (layer.A.weight, layer.B.weight))
        damped = problem.towards(weight, following.ridge)
        new_a, new_b = self.refiner.refine(damped, weight, a, b)
        stored_a = new_a.to(self.job.dtype)
        cast = not torch.equal(stored_a.to(new_a), new_a)
        stored_b = (best_b(damped, stored_a) if cast else new_b).to(self.job.dtype)
        product = stored_b.double() @ stored_a.double()
        bias = None
        if biased:
            old = 0 if layer.bias is None else layer.bias.detach().to(weight.device)
            bias = (old + sums.bias_change(weight, product)).to(self.job.dtype)
        errors = {"before": _relative(problem, b @ a), "after": _relative(problem, product)}
        return {"A": stored_a, "B": stored_b, "bias": bias}, errors

    def _put(self, target: Target, new: Mapping[str, Tensor | None]) -> None:
        layer: LowRankLinear = self.job.model.get_submodule(target.path)
        for factor, tensor in ((layer.A, new["A"]), (layer.B, new["B"])):
            if tensor is not None:
                factor.weight.data = tensor.to(factor.weight).contiguous()
        bias = new["bias"]
        if bias is not None and layer.B.bias is None:
            layer.B.bias = nn.Parameter(bias.to(layer.B.weight), requires_grad=layer.B.weight.requires_grad)
            self.cutter.done.new_biases += bias.numel()
        elif bias is not None:
            layer.B.bias.data = bias.to(layer.B.bias)


def _relative(problem: Any, product: Tensor) -> float:
    return (max(0.0, problem.loss(product)) / problem.energy) ** 0.5 if problem.energy > 0 else 0.0


@contextmanager
def _swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Other modules at these paths, for the time of the context."""
    mine = {path: model.get_submodule(path) for path in modules}
    try:
        for path, module in modules.items():
            model.set_submodule(path, module)
        yield
    finally:
        for path, module in mine.items():
            model.set_submodule(path, module)
