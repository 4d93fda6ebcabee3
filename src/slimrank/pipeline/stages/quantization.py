"""Round the weights of a model block by block, towards the outputs of the model before."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from slimrank.layers.base import CompressedLinear
from slimrank.layers.dense import weight_of
from slimrank.layers.quantized_forms import quantized_form
from slimrank.methods.quantize_options import QuantizeOptions
from slimrank.models.page_out import page_out
from slimrank.models.targets import Target
from slimrank.pipeline.stages.dual_stream import DualStream
from slimrank.statistics.paired_inputs import LayerSums
from slimrank.store import Store

if TYPE_CHECKING:
    from slimrank.pipeline.state import State


class Quantization:
    """Round the layers of each block in the order in which they run, each on the outputs of those rounded before it.

    Two streams of hidden states pass through the blocks: those of the model before rounding, and those of the model
    that is rounded so far. A rounded layer is to give the outputs of the first from the inputs of the second.

    Args:
        state: holds the model.
        options: how to round.
        store: where finished blocks are stored.
        forms: target -> what it is rounded to.

    Attributes:
        errors: target -> relative error of its outputs, where inputs were looked at.
    """

    def __init__(self, state: State, options: QuantizeOptions, store: Store, forms: Mapping[str, str]) -> None:
        self.state, self.options, self.store, self.errors = state, options, store, dict[str, float]()
        self.streams = DualStream.of(state, options.following(), options.largest)
        self.runner = self.streams.runner
        self.forms = {path: quantized_form(name) for path, name in forms.items()}

    def run(self, title: str) -> None:
        """Round all blocks in order; blocks that an earlier run has finished are not repeated."""
        state, blocks = self.state, range(len(self.runner))
        with state.timed(title, len(blocks)):
            if self.options.rounding == "nearest":
                for index in blocks:
                    self._nearest(index)
                    state.progress.step()
            else:
                with self.runner.session():
                    self.streams.start()
                    for index in blocks[self._take_up() :]:
                        self._block(index)
                        state.progress.step()

    def _rank(self, target: Target) -> int:
        rank = self.state.plan.targets[target.path].rank
        return 0 if rank == "dense" else rank

    def _targets(self, index: int) -> dict[str, Target]:
        return {t.path: t for t in self.state.prepared.targets.in_block(index) if t.path in self.forms}

    def _take_up(self) -> int:
        """Put in what an earlier run has finished; return the next block."""
        if not self.store.has("streams"):
            return 0
        streams, about = self.store.load("streams")
        self.streams.take_up(streams)
        for index in range(about["next"]):
            tensors, errors = self.store.load(f"quantized-{index:04d}")
            for path, target in self._targets(index).items():
                layer = self.forms[path].empty(*target.shape, self._rank(target), self.state.prepared.dtype)
                mine = f"{path}."
                layer.load_state_dict({k.removeprefix(mine): v for k, v in tensors.items() if k.startswith(mine)})
                self._put(path, layer)
            self.errors |= errors
            self.state.progress.step()
        return int(about["next"])

    def _block(self, index: int) -> None:
        targets, tensors, errors = self._targets(index), dict[str, Tensor](), dict[str, float]()
        originals = {path: self._doubled(path) for path in targets}
        stages = self.streams.stages(index, list(targets))
        for number, paths in enumerate(stages, 1):
            gathered = self.streams.gather(index, originals, paths, last=number == len(stages))
            for path in paths:
                parts = [sums for collector in gathered if (sums := collector.of(path)) is not None]
                layer, errors[path] = self._rounded(targets[path], originals[path], parts)
                tensors |= {f"{path}.{name}": tensor for name, tensor in layer.state_dict().items()}
                self._put(path, layer)
        self.errors |= errors
        self.streams.step(index)
        page_out(self.runner.blocks[index])
        if self.state.resumable:
            self._store(index, tensors, errors)

    def _nearest(self, index: int) -> None:
        for path in self._targets(index):
            layer = self.state.model.get_submodule(path)
            self._put(path, self.forms[path].nearest(layer, self.state.prepared.dtype))

    def _store(self, index: int, tensors: Mapping[str, Tensor], errors: Mapping[str, float]) -> None:
        self.store.save(f"quantized-{index:04d}", dict(tensors), dict(errors))
        self.store.save_parts("streams", self.streams.states(), {"next": index + 1})

    def _doubled(self, path: str) -> nn.Module:
        """Put a layer of the same tensors there, and return the one that was there."""
        layer: nn.Module = self.state.model.get_submodule(path)
        held = {id(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers())}
        self.state.model.set_submodule(path, copy.deepcopy(layer, held))
        return layer

    def _rounded(self, target: Target, layer: Any, parts: list[LayerSums]) -> tuple[Any, float]:
        """Return the rounded layer, and its relative error on its inputs; without inputs, to the nearest."""
        form, dtype = self.forms[target.path], self.state.prepared.dtype
        if not parts:
            self.state.notes.append(f"{target.path}: no calibration token reached this layer: rounded to the nearest")
            return form.nearest(layer, dtype), 0.0
        weight = (layer.weight if isinstance(layer, CompressedLinear) else weight_of(layer)).detach()
        weight = weight.to(self.state.prepared.solver)
        following = self.options.following()
        problem = reduce(add, parts).problem(weight, False).towards(weight, self.options.ridge, following.ridge_unit)
        new: Any = form.fit(problem, layer, self._rank(target), dtype)
        lost = problem.loss(new.weight.detach().to(problem.gram)) / problem.energy if problem.energy > 0 else 0.0
        return new, max(0.0, lost) ** 0.5

    def _put(self, path: str, layer: Any) -> None:
        """Put a rounded layer instead of another, whose bias it takes."""
        old: Any = self.state.model.get_submodule(path)
        weight = next(old.parameters())
        layer = layer.to(weight.device)
        bias = None if old.bias is None else old.bias.detach()
        if isinstance(layer, CompressedLinear):
            layer.set_bias(bias)
        else:
            layer.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        layer.requires_grad_(weight.requires_grad)
        self.state.model.set_submodule(path, layer.train(old.training))
