"""Refine the factors block by block, in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimrank.layers.base import CompressedLinear, load_tensors
from slimrank.layers.dense import weight_of
from slimrank.layers.forms import layer_form
from slimrank.linalg.forms import Form
from slimrank.linalg.regression import Regression, best_b
from slimrank.linalg.ridge import RIDGES, cross_validated
from slimrank.methods.refiner import RefineOptions
from slimrank.models.page_out import page_out
from slimrank.models.states import named, states_named
from slimrank.models.structure import without_numbers
from slimrank.models.targets import Target
from slimrank.pipeline.stages.dual_stream import DualStream
from slimrank.pipeline.stages.factorize import Factorizer
from slimrank.pipeline.stages.held_out_check import HeldOutCheck
from slimrank.processes import processes
from slimrank.statistics.paired_inputs import LayerSums, StreamCollector
from slimrank.store import Store

if TYPE_CHECKING:
    from slimrank.pipeline.state import State


TITLE = "cut and refine factors"
_MORE_OUTPUTS = "more outputs than inputs: it does not compensate for errors of the residual stream"
UNSEEN = 1e-3  # ridge added to a chosen one, for inputs that the text does not show
_ROUTED = "experts get different tokens in the two models: refined towards the original weight on their own inputs"
_UNDONE = "refining was undone in {count} of {blocks} blocks: no nearer to the original on held-out windows with it "


class Refinement:
    """Factorize the blocks in order and refine the factors of each, on both streams.

    Layers of a block are solved in the order in which they run, each on the outputs of the refined layers before
    it. The block runs again for each group of layers, only as far as that group. At the end it runs on the
    compressed stream again, to pass on the outputs of the refined factors.
    """

    def __init__(self, state: State, factorizer: Factorizer, store: Store) -> None:
        assert state.prepared.choices.refiner is not None
        self.state, self.factorizer, self.store, self.refiner = state, factorizer, store, state.prepared.choices.refiner
        self.streams = DualStream.of(state, state.prepared.choices.refiner.following)
        self.runner = self.streams.runner
        count = state.prepared.choices.refiner.following.held_out
        self.held_out = HeldOutCheck(state, count, store) if count else None
        self.undone: dict[int, tuple[float, float]] = {}  # block -> divergence before and after refining

    def run(self) -> None:
        """Factorize and refine all blocks in order."""
        state, runner = self.state, self.runner
        with state.timed(TITLE, len(runner)), runner.session():
            first = int(self.store.load("streams")[1]["next"]) if self.store.has("streams") else 0
            self.streams.start()
            if self.held_out is not None:
                self.held_out.start()
            if first:
                state.progress.note(f"resuming at block {first} of {len(runner)}")
                self._take_up(first)
            for index in range(first, len(runner)):
                self._block(index)
                state.progress.step()
        if self.undone:
            self.state.notes.append(_of_undone(self.undone, len(runner)))

    def _take_up(self, first: int) -> None:
        streams, _ = self.store.load("streams")
        self.streams.take_up(streams)
        if self.held_out is not None:
            self.held_out.states = states_named(streams, "held-out.", self.held_out.numbers)
        for index in range(first):
            self.factorizer.factorize_block(index)
            tensors, about = self.store.load(f"refined-{index:04d}")
            for target in self._factored(index):
                mine = f"{target.path}."
                found = {k.removeprefix(mine): v for k, v in tensors.items() if k.startswith(mine)}
                if found:
                    self._put(target, found)
                elif target.path not in about["errors"]:
                    self._not_refined(target)
            self._told(index, about)
            self._let_go(index)
            self.state.progress.step()

    def _told(self, index: int, about: Mapping[str, Any]) -> None:
        """Add what the report says about a block to the results."""
        if about["undone"]:
            self.undone[index] = about["undone"]
        for path, errors in about["errors"].items():
            self.state.results.rows[path]["refined"] = errors
        self.state.notes += [note for note in about["notes"] if note not in self.state.notes]

    def _not_refined(self, target: Target) -> None:
        self.state.notes.append(f"{target.path}: no calibration token reached this layer: not refined")

    def _let_go(self, index: int) -> dict[str, nn.Module]:
        """Release and return the original layers of a block, including tied layers of other blocks' targets."""
        inside = f"{self.runner.path}.{index}."
        mine = {path: layer for path, layer in self.factorizer.originals.items() if path.startswith(inside)}
        for path in mine:
            del self.factorizer.originals[path]
        return mine

    def _factored(self, index: int) -> list[Target]:
        return [
            t for t in self.state.prepared.targets.in_block(index) if self.state.plan.targets[t.path].rank != "dense"
        ]

    def _block(self, index: int) -> None:
        self.factorizer.factorize_block(index)
        targets = {t.path: t for t in self._factored(index)}
        originals = self._let_go(index)
        cut = {path: self._state(path) for path in targets}
        refined: dict[str, dict[str, Tensor]] = {}
        about: dict[str, Any] = {"errors": {}, "notes": [], "undone": None}
        stages = self.streams.stages(index, list(targets))
        for number, paths in enumerate(stages, 1):
            gathered = self.streams.gather(index, originals, paths, last=number == len(stages))
            about["notes"] += _of_routed(gathered)
            parts = {path: [sums for each in gathered if (sums := each.of(path)) is not None] for path in paths}
            for path in (path for path in paths if not parts[path]):
                self._not_refined(targets[path])
            for path, found in self._solved(targets, originals, parts, about["notes"]).items():
                refined[path], about["errors"][path] = found
                self._put(targets[path], refined[path])
        if self.held_out is not None and refined and self._undone(index, targets, cut, refined, about):
            refined = {}
        self._told(index, about)
        self.streams.step(index)
        if self.held_out is not None:
            self.held_out.step(index)
        page_out(self.runner.blocks[index])
        if self.state.resumable:
            self._store(index, refined, about)

    def _solved(
        self,
        targets: Mapping[str, Target],
        originals: Mapping[str, nn.Module],
        parts: Mapping[str, list[LayerSums]],
        notes: list[str],
    ) -> dict[str, tuple[dict[str, Tensor], dict[str, float]]]:
        """Refine the layers that have sums, each in one of the processes; see `_refined`."""
        mine = processes().mine([path for path, sums in parts.items() if sums])
        new: list[str] = []
        found = {path: self._refined(targets[path], weight_of(originals[path]), parts[path], new) for path in mine}
        for theirs, others in processes().all((found, new)):
            found |= {path: each for path, each in theirs.items() if path not in found}
            notes += others
        return {path: found[path] for path in parts if path in found}

    def _undone(
        self,
        index: int,
        targets: Mapping[str, Target],
        cut: Mapping[str, Mapping[str, Tensor]],
        refined: Mapping[str, Mapping[str, Tensor]],
        about: dict[str, Any],
    ) -> bool:
        """Undo the refinement of a block if that is nearer to the original on held-out windows; tell whether it is."""
        assert self.held_out is not None
        after = self.held_out.divergence(index)
        for path in refined:
            self._put_back(targets[path], cut[path])
        before = self.held_out.divergence(index)
        if not after <= before:  # NaN is never nearer
            about["errors"] = {p: {**e, "after": e["before"], "undone": True} for p, e in about["errors"].items()}
            about["notes"], about["undone"] = [], (before, after)
            return True
        for path, state in refined.items():
            self._put(targets[path], state)
        return False

    def _state(self, path: str) -> dict[str, Tensor]:
        """Return the tensors of a layer; they stay the same when others replace them."""
        return dict(self.state.model.get_submodule(path).state_dict())

    def _put_back(self, target: Target, cut: Mapping[str, Tensor]) -> None:
        """Restore the tensors that a layer had before refining; remove a bias that refining added."""
        for path in (target.path, *target.ties):
            layer: CompressedLinear = self.state.model.get_submodule(path)
            if layer.bias is not None and not any(name.endswith("bias") for name in cut):
                self.state.results.new_biases -= layer.bias.numel()
                layer.set_bias(None)
        self._put(target, cut)

    def _store(self, index: int, refined: Mapping[str, Mapping[str, Tensor]], about: dict[str, Any]) -> None:
        tensors = {f"{path}.{name}": tensor for path, state in refined.items() for name, tensor in state.items()}
        self.store.save(f"refined-{index:04d}", tensors, about)
        states = self.streams.states()
        if self.held_out is not None:
            states |= named("held-out.", self.held_out.states, self.held_out.numbers)
        self.store.save_parts("streams", states, {"next": index + 1})

    def _row(self, target: Target) -> Form:
        """Return the form on the outputs that refining minimises in."""
        return self.factorizer.spectra.row(target) if self.refiner.in_metric else Form()

    def _refined(
        self, target: Target, original: Tensor, parts: list[LayerSums], notes: list[str]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the tensors of the refined layer in the stored dtype, its relative errors and its ridge."""
        layer: CompressedLinear = self.state.model.get_submodule(target.path)
        following, row, weight = self.refiner.following, self._row(target), original.to(self.state.prepared.solver)
        if row.seen and any(part.lack is not None for part in parts):
            notes.append(f"{target.path}: {_MORE_OUTPUTS}")
            parts = [replace(part, lack=None) for part in parts]
        biased = not target.ties and (following.bias == "all" or (following.bias == "existing" and target.bias))
        sums = reduce(add, parts)
        problem, *halves = (
            replace(some.problem(weight, biased), row=row)
            for some in (sums, *(parts if following.ridge == "auto" else ()))
        )
        damped, ridge = _damped(problem, halves, weight, following)
        a, b = (factor.to(weight.device) for factor in layer.factors())
        new = self._stored(damped, *self.refiner.refine(damped, weight, a, b))
        new_a, new_b = new.factors()
        product = new_b @ new_a
        if biased:
            old = 0 if layer.bias is None else layer.bias.detach().to(weight.device)
            new.set_bias((old + sums.bias_change(weight, product)).to(self.state.prepared.dtype))
        errors = {"before": _relative(problem, b @ a), "after": _relative(problem, product), "ridge": ridge}
        return new.state_dict(), errors

    def _stored(self, problem: Regression, a: Tensor, b: Tensor) -> CompressedLinear:
        """Make the layer of refined factors; B is fitted again to the cast A."""
        layer = layer_form(self.state.plan.stored_as).build(a, b, None, dtype=self.state.prepared.dtype)
        cast, _ = layer.factors()
        if not torch.equal(cast, a):
            layer.set_b(best_b(problem, cast))
        return layer

    def _put(self, target: Target, new: Mapping[str, Tensor]) -> None:
        """Load tensors into a layer and those tied to it; a bias without a new tensor stays."""
        layers = [self.state.model.get_submodule(path) for path in (target.path, *target.ties)]
        bias = next((tensor for name, tensor in new.items() if name.endswith("bias")), None)
        if bias is not None and layers[0].bias is None:
            layers[0].set_bias(torch.empty_like(bias, device=next(layers[0].parameters()).device))
            layers[0].requires_grad_(next(layers[0].parameters()).requires_grad)
            self.state.results.new_biases += bias.numel()
        for layer in layers:
            load_tensors(layer, new)


def _of_undone(undone: Mapping[int, tuple[float, float]], blocks: int) -> str:
    each = "; ".join(f"{index}: {before:.4f}, {after:.4f}" for index, (before, after) in undone.items())
    return f"{_UNDONE.format(count=len(undone), blocks=blocks)}(block: nats without, with): {each}"


def _of_routed(gathered: list[StreamCollector]) -> list[str]:
    """Write a note for each kind of experts whose target is self in spite of an anchor."""
    routed = {path for collector in gathered if collector.anchor for path in collector.routed}
    return [f"{role}: {_ROUTED}" for role in sorted({without_numbers(path) for path in routed})]


def _damped(
    problem: Regression, halves: list[Regression], weight: Tensor, following: RefineOptions
) -> tuple[Regression, float]:
    """Return the problem with a pull towards the original weight, and its ridge.

    If only one half of the text reaches a layer (an expert), nothing can choose a ridge: it is the largest.
    """
    ridge, unit = following.ridge, following.ridge_unit
    if ridge != "auto":
        return problem.towards(weight, ridge, unit), ridge
    chosen = cross_validated((halves[0], halves[1]), weight, unit) if len(halves) == 2 else RIDGES[-1]
    return problem.shrunk(weight, chosen, unit).towards(weight, UNSEEN, unit), chosen


def _relative(problem: Any, product: Tensor) -> float:
    return (max(0.0, problem.loss(product)) / problem.energy) ** 0.5 if problem.energy > 0 else 0.0
