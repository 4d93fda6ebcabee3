"""Narrow the MLPs block by block, on the inputs that each block has in the model that is narrow so far."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.layers.dense import weight_of
from slimrank.linalg.regression import Regression
from slimrank.linalg.subset import Selection, restricted, select
from slimrank.methods.refiner import RefineOptions
from slimrank.narrowing.layers import keep_units, set_bias, set_weight
from slimrank.narrowing.widths import Widths
from slimrank.pipeline.stages.dual_stream import DualStream
from slimrank.progress import Progress
from slimrank.statistics.paired_inputs import LayerSums

SUBSET_RIDGE = 1e-4  # of the energy of each input: pull of the units that stay towards their columns
SCARCE_RIDGE = 0.05  # the same for each unit by a token that is missing


@dataclass(frozen=True)
class NarrowOptions:
    """How hidden units are chosen, and what is solved for again.

    Attributes:
        selection: how units are chosen.
        refit: "readers": the layers that read hidden units; "all": all linear layers.
        anchor: weight of the original model's outputs in the target, see `RefineOptions`.
        ridge: pull towards the original weight, before units are taken away, in units of the mean energy of inputs.
    """

    selection: Selection = "eliminate"
    refit: str = "readers"
    anchor: float = 1.0
    ridge: float = 1e-2

    def following(self) -> RefineOptions:
        """Return them as the options of the two streams."""
        return RefineOptions(anchor=self.anchor, ridge=self.ridge, bias="existing", held_out=0)


@dataclass(frozen=True)
class NarrowedMlp:
    """One MLP that was narrowed.

    Attributes:
        reader: path of the layer that reads its hidden units.
        before: hidden units, before.
        after: the same after.
        error: squared error of its outputs on the calibration text, relative to their energy; None without tokens.
    """

    reader: str
    before: int
    after: int
    error: float | None


class Narrower:
    """Narrows the MLPs of a model.

    Args:
        streams: the two streams, not started; their runner holds the model.
        widths: the new widths.
        layers: paths of all linear layers, by block.
        options: how.
    """

    def __init__(
        self, streams: DualStream, widths: Widths, layers: Mapping[int, Sequence[str]], options: NarrowOptions
    ) -> None:
        self.streams, self.layers, self.options = streams, layers, options
        self.widths = widths.of()
        self.mlps = {mlp.reader: mlp for field in widths.fields for mlp in field.mlps}
        self.model = streams.runner.model
        self.found: list[NarrowedMlp] = []

    def run(self, progress: Progress) -> list[NarrowedMlp]:
        """Narrow all blocks in order."""
        runner = self.streams.runner
        progress.stage("narrow", len(runner))
        with runner.session():
            self.streams.start()
            for index in range(len(runner)):
                self._block(index)
                self.streams.step(index)
                progress.step()
        return self.found

    def _block(self, index: int) -> None:
        mlps = [mlp for mlp in self.mlps.values() if mlp.block == index]
        paths = list(self.layers.get(index, ())) if self.options.refit == "all" else [mlp.reader for mlp in mlps]
        changed = dict.fromkeys([*paths, *(path for mlp in mlps for path in mlp.paths)])
        originals = {path: copy.deepcopy(self.model.get_submodule(path)) for path in changed}
        stages = self.streams.stages(index, paths)
        for stage in stages:
            (sums,) = self.streams.gather(index, originals, stage, last=stage is stages[-1])
            for path in stage:
                self._layer(path, originals[path], sums.of(path))

    def _layer(self, path: str, original: nn.Module, sums: LayerSums | None) -> None:
        """Solve for a layer; take hidden units away where it reads some."""
        layer: Any = self.model.get_submodule(path)
        weight, biased = weight_of(original).double().to(self.streams.solver), layer.bias is not None
        plain = _problem(weight, sums, biased)
        aim = plain.shrunk(weight, self.options.ridge, "identity")  # what no weight explains is not fitted to
        problem = aim.towards(aim.solution(), _subset_ridge(sums, weight.shape[1]))
        kept = self._kept(path, problem)
        found = torch.zeros_like(weight)
        found[:, kept] = restricted(problem, kept)
        set_weight(layer, found[:, kept])
        if biased and sums is not None:
            set_bias(layer, original.bias.data + sums.bias_change(weight, found).to(original.bias.data))  # type: ignore
        mlp = self.mlps.get(path)
        if mlp is not None:
            keep_units(self.model, mlp.makers, mlp.width, kept)
            error = None if sums is None or plain.energy <= 0 else max(0.0, plain.loss(found) / plain.energy)
            self.found.append(NarrowedMlp(path, mlp.width, len(kept), error))

    def _kept(self, path: str, problem: Regression) -> Tensor:
        count = self.widths.get(path, len(problem.gram))
        return select(problem, count, self.options.selection)


def _subset_ridge(sums: LayerSums | None, width: int) -> float:
    """Return the pull of the units that stay towards their columns: more where tokens are fewer than four a unit."""
    scarce = 0.0 if sums is None else width / sums.streams.inputs.count - 0.25
    return SUBSET_RIDGE + SCARCE_RIDGE * max(0.0, scarce)


def _problem(weight: Tensor, sums: LayerSums | None, centred: bool) -> Regression:
    """Return the problem of a layer; without tokens, that of inputs that have nothing to do with each other."""
    if sums is not None:
        return sums.problem(weight, centred)
    return Regression(torch.eye(weight.shape[1]).to(weight), weight, float(weight.square().sum()))
