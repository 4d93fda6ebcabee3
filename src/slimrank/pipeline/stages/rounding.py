"""Measure rounding: what few bits lose of each weight's outputs, before form, rank and bits are chosen together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slimrank.budget.menu import MEASURED_BITS, Noise
from slimrank.layers.dense import weight_of
from slimrank.linalg.forms import Form
from slimrank.linalg.gptq import gptq
from slimrank.linalg.lowrank import solve
from slimrank.linalg.regression import Regression
from slimrank.methods.refiner import RefineOptions
from slimrank.models.page_out import page_out
from slimrank.models.targets import Target
from slimrank.pipeline.forecast import Cost, Shape, group_widths
from slimrank.pipeline.stage import STAGES, Stage
from slimrank.pipeline.stages.dual_stream import DualStream
from slimrank.pipeline.stages.spectrum_store import SpectrumStore
from slimrank.text.texts import WindowRequest

if TYPE_CHECKING:
    from slimrank.pipeline.prepare import Choices, Prepared
    from slimrank.pipeline.state import State

TITLE = "measure rounding"
OWN_INPUTS = RefineOptions(anchor=0.0, held_out=0, residual=False, true_sequential=False)


@STAGES.add
class Rounding(Stage):
    """Round every weight to 4 bits for a try; other widths follow, since each bit more quarters the squared error."""

    id, order, title = "rounding", 25, TITLE

    def wanted(self, choices: Choices) -> bool:
        return bool(choices.recipe.bits)

    def windows(self, choices: Choices) -> list[WindowRequest]:
        return [WindowRequest("calibration", choices.recipe.samples)]

    def cost(self, prepared: Prepared, shape: Shape) -> Cost:
        tokens = shape.tokens.get("calibration", 0)
        sums = sum(8 * n * n for n in group_widths(shape.first))
        return Cost(
            float32=2 * shape.forward(tokens) + shape.grams(tokens),
            float64=sum(4 * t.parameters * t.shape[1] for t in shape.targets) + shape.decompose(),
            peak=shape.copies + 2 * tokens * shape.width * shape.compute_bytes + sums + shape.solving,
        )

    def key(self, state: State) -> dict[str, Any]:
        return {"rounding": str(state.prepared.recipe.scheme(MEASURED_BITS))}

    def run(self, state: State) -> None:
        store, work = state.store(state.chained(self.id)), _Trial(state)
        blocks = range(len(work.runner))
        with state.timed(TITLE, len(blocks)):
            if not store.has("noises"):
                with work.runner.session():
                    work.streams.start()
                    found = [work.block(index) for index in blocks]
                store.save("noises", {}, {path: each for block in found for path, each in block.items()})
            for path, (at_four, left) in store.load("noises")[1].items():
                state.results.noises[path] = Noise(at_four, {int(rank): share for rank, share in left.items()})


class _Trial:
    """Round the weights of each block on their inputs in the original model, which stays as it is."""

    def __init__(self, state: State) -> None:
        self.state, self.streams, self.spectra = state, DualStream(state, OWN_INPUTS), SpectrumStore(state)
        self.runner = self.streams.runner

    def block(self, index: int) -> dict[str, Any]:
        """Measure the weights of a block, and pass through it."""
        targets = {t.path: t for t in self.state.prepared.targets.in_block(index)}
        gathered = self.streams.gather(index, {}, list(targets), last=True)
        found = {}
        for path, target in targets.items():
            sums = [part for collector in gathered if (part := collector.of(path)) is not None]
            found[path] = self._noise(target, sums[0].streams.inputs.gram if sums else None)
        self.streams.step(index)
        page_out(self.runner.blocks[index])
        self.state.progress.step()
        return found

    def _noise(self, target: Target, gram: Tensor | None) -> tuple[float, dict[str, float]]:
        """Return what 4 bits lose of a weight, and which part of it is left beside corrections of few ranks."""
        state, weight = self.state, weight_of(self.state.model.get_submodule(target.path))
        assert state.prepared.problem is not None
        weight = weight.to(state.prepared.solver, torch.float64)
        if gram is None:  # no token reached it: nothing would miss it
            gram = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
        rounded = gptq(weight, gram, state.prepared.recipe.scheme(MEASURED_BITS), state.prepared.dtype, sweeps=0)
        lost, menu = weight - rounded.values(), state.prepared.problem.menus[target.path]
        ranks = sorted({int(c.rank) for c in menu.candidates if c.rank != "dense"})
        spectrum = solve(lost, Regression(gram, lost).metric()) if ranks else None
        left = {str(rank): spectrum.relative_error(rank) ** 2 for rank in ranks} if spectrum is not None else {}
        return relative_energy(lost, weight, gram, self.spectra.row(target)), left


def relative_energy(lost: Tensor, weight: Tensor, gram: Tensor, row: Form) -> float:
    """Return tr(G E C E^T) / tr(G W C W^T) for an error E of a weight W (m x n).

    A form G that is only seen through W shows the part of E in the span of W's columns. The rest of E counts alike.

    Args:
        lost: E.
        weight: W.
        gram: C (n x n).
        row: G.
    """
    g = row.matrix()
    if g is not None and row.seen:
        inside = torch.linalg.lstsq(weight, lost).solution
        whole, found = float((g * gram).sum()), float(((g @ inside @ gram) * inside).sum())
        found *= weight.shape[0] / weight.shape[1]
    else:
        found, whole = (float((_times(g, w @ gram) * w).sum()) for w in (lost, weight))
    return found / whole if whole > 0 else 0.0


def _times(form: Tensor | None, x: Tensor) -> Tensor:
    if form is None:
        return x
    form = form.to(x)
    return form[:, None] * x if form.dim() == 1 else form @ x
