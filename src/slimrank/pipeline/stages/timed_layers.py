"""Times of single layers on this machine, and layers of random numbers whose time is that of real ones.

Where the result is going to be packed, layers are timed as packing leaves them. A group of layers of the same inputs is
timed as one, and each of its layers gets the part of that time which it takes of the sum of their times alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from slimrank.budget.ranks import Rank
from slimrank.budget.timed import LayerTimes
from slimrank.layers.base import CompressedLinear
from slimrank.layers.dense import weight_of
from slimrank.layers.forms import layer_form
from slimrank.layers.packed import join, part, reader
from slimrank.layers.stand_ins import stand_in
from slimrank.models.memory_layout import choose_layouts
from slimrank.models.packing import groups_of
from slimrank.models.timing import layer_seconds

if TYPE_CHECKING:
    from slimrank.pipeline.state import State

GRID = (0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0)  # of the largest rank that stores less than the dense weight


class Together(nn.Module):
    """Layers of the same inputs that are computed together; so are those of its copies."""

    def __init__(self, layers: Sequence[CompressedLinear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        join(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the outputs (... x out) of each layer for inputs (... x in)."""
        return [layer(x) for layer in self.layers]

    def __deepcopy__(self, memo: dict[int, Any]) -> Together:
        layers: list[Any] = list(self.layers)
        for layer in layers:
            part(layer)
        copies = copy.deepcopy(layers, memo)
        join(layers)
        return Together(copies)


class TimedLayers:
    """Layers in the form and at the ranks that a recipe may choose.

    Args:
        state: holds the model, which stays as it is.
        inputs: makes inputs of a layer, of a width and like a tensor.
    """

    def __init__(self, state: State, inputs: Callable[[int, Tensor], Tensor]) -> None:
        recipe = state.prepared.recipe
        self.state, self.model, self.inputs = state, state.model, inputs
        self.form, self.packed = recipe.form, recipe.packed
        self._layouts: dict[Any, bool] = {}

    def times(self) -> dict[str, LayerTimes]:
        """Measure every target; those of one shape are measured once."""
        alone: dict[Any, LayerTimes] = {}
        for target in self.state.prepared.targets:
            key = self._key(target.path)
            if key not in alone:
                self.state.progress.note(f"measuring layers of {target.shape[0]} x {target.shape[1]}")
                alone[key] = self._times_of(self.model.get_submodule(target.path))
        found = {target.path: alone[self._key(target.path)] for target in self.state.prepared.targets}
        return found | self._shared(found)

    def stand_ins(self, ranks: Mapping[str, Rank]) -> dict[str, nn.Module]:
        """Return layers of these ranks for all paths that are not to stay dense, packed where the result is."""
        made: dict[Any, CompressedLinear] = {}
        found: dict[str, CompressedLinear] = {}
        for path, rank in ranks.items():
            if rank != "dense":
                key = (*self._key(path), rank)
                made[key] = made.get(key) or stand_in(self.form, self.model.get_submodule(path), rank)
                found[path] = copy.deepcopy(made[key])
        for paths in self._groups:
            layers = [found[path] for path in paths if path in found]
            if len(layers) > 1:
                join(layers)
        self._lay_out(list(found.values()))
        return dict(found)

    # packed layers -------------------------------------------------------------------------------------------

    @cached_property
    def _groups(self) -> list[list[str]]:
        """The paths of targets that are going to be computed together."""
        if not self.packed:
            return []
        paths = {
            self.model.get_submodule(target.path): target.path
            for target in self.state.prepared.targets
            if not target.ties and reader(stand_in(self.form, self.model.get_submodule(target.path), 1)) is not None
        }
        groups = groups_of(self.model, list(paths))
        return [[paths[layer] for layer in group] for group in groups if len(group) > 1]

    def _shared(self, alone: Mapping[str, LayerTimes]) -> dict[str, LayerTimes]:
        """Return the times of all layers in groups, of those that they take alone."""
        known: dict[Any, list[float]] = {}
        found = {}
        for paths in self._groups:
            key = tuple(map(self._key, paths))
            if key not in known:
                self.state.progress.note(f"measuring {len(paths)} layers of the same inputs together")
                known[key] = self._parts_of_sum(paths, [alone[path] for path in paths])
            for path in paths:
                seconds = zip(alone[path].seconds, known[key], strict=True)
                scaled = tuple(own * factor for own, factor in seconds)
                found[path] = LayerTimes(alone[path].dense, alone[path].ranks, scaled)
        return found

    def _parts_of_sum(self, paths: Sequence[str], alone: Sequence[LayerTimes]) -> list[float]:
        """Measure, at each fraction of the grid, the time of layers together over the sum of their times alone."""
        like = [self.model.get_submodule(path) for path in paths]
        together = []
        for ranks in zip(*(self._ranks(layer) for layer in like), strict=True):
            layers = [stand_in(self.form, layer, rank) for layer, rank in zip(like, ranks, strict=True)]
            together.append(Together(layers))
            self._lay_out(layers)
        weight = weight_of(like[0])
        seconds = layer_seconds(together, self.inputs(weight.shape[1], weight))
        sums = [sum(each) for each in zip(*(times.seconds for times in alone), strict=True)]
        return [one / total for one, total in zip(seconds, sums, strict=True)]

    def _lay_out(self, layers: Sequence[CompressedLinear]) -> None:
        if self.packed:
            choose_layouts(layers, self._layouts)

    # layers by themselves ------------------------------------------------------------------------------------

    def _key(self, path: str) -> tuple[Any, ...]:
        layer = self.model.get_submodule(path)
        return (*weight_of(layer).shape, weight_of(layer).dtype, layer.bias is not None)

    def _ranks(self, layer: nn.Module) -> list[int]:
        """Return the ranks that a layer is measured at, one for each fraction of the grid."""
        largest = layer_form(self.form).largest_rank(*weight_of(layer).shape)
        return [max(1, round(part * largest)) for part in GRID]

    def _times_of(self, layer: nn.Module) -> LayerTimes:
        """Measure one layer as it is, and in its form at several ranks."""
        weight, ranks = weight_of(layer), self._ranks(layer)
        layers = [stand_in(self.form, layer, rank) for rank in ranks]
        self._lay_out(layers)
        dense, *others = layer_seconds([layer, *layers], self.inputs(weight.shape[1], weight))
        return LayerTimes(dense, tuple(ranks), tuple(others))
