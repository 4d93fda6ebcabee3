"""Measure rounding: what few bits lose of each weight's outputs, before form, rank and bits are chosen together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slimrank.budget.menu import Menu, Noise
from slimrank.layers.dense import weight_of
from slimrank.linalg.gptq import error, gptq
from slimrank.linalg.lowrank import solve
from slimrank.linalg.regression import Regression
from slimrank.linalg.scheme import Scheme
from slimrank.methods.refiner import RefineOptions
from slimrank.models.page_out import page_out
from slimrank.models.targets import Target
from slimrank.pipeline.forecast import Cost, Shape, group_widths
from slimrank.pipeline.stage import STAGES, Stage
from slimrank.pipeline.stages.dual_stream import DualStream
from slimrank.text.texts import WindowRequest

if TYPE_CHECKING:
    from slimrank.pipeline.prepare import Choices, Prepared
    from slimrank.pipeline.state import State

TITLE = "measure rounding"
MEASURED_BITS = 4
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
        store, streams = state.store(state.chained(self.id)), DualStream(state, OWN_INPUTS)
        blocks = range(len(streams.runner))
        with state.timed(TITLE, len(blocks)):
            if not store.has("noises"):
                with streams.runner.session():
                    streams.start()
                    found = [_of_block(state, streams, index) for index in blocks]
                store.save("noises", {}, {path: each for block in found for path, each in block.items()})
            for path, (at_four, left) in store.load("noises")[1].items():
                state.results.noises[path] = Noise(at_four, {int(rank): share for rank, share in left.items()})


def _of_block(state: State, streams: DualStream, index: int) -> dict[str, Any]:
    """Measure the weights of a block on their inputs in the original model, which then pass through it."""
    assert state.prepared.problem is not None
    targets = {t.path: t for t in state.prepared.targets.in_block(index)}
    gathered = streams.gather(index, {}, list(targets), last=True)
    found = {}
    for path, target in targets.items():
        sums = [part for collector in gathered if (part := collector.of(path)) is not None]
        gram = sums[0].streams.inputs.gram if sums else None
        found[path] = _noise(state, target, gram, state.prepared.problem.menus[path])
    streams.step(index)
    page_out(streams.runner.blocks[index])
    state.progress.step()
    return found


def _noise(state: State, target: Target, gram: Tensor | None, menu: Menu) -> tuple[float, dict[str, float]]:
    """Return what 4 bits lose of a weight's outputs, and which part of it is left beside corrections of few ranks."""
    weight = weight_of(state.model.get_submodule(target.path)).to(state.prepared.solver, torch.float64)
    if gram is None:  # no token reached it: nothing would miss it
        gram = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
    scheme: Scheme = state.prepared.recipe.scheme(MEASURED_BITS)
    lost = weight - gptq(weight, gram, scheme, state.prepared.dtype, sweeps=0).values()
    energy, noise = (float(error(w, torch.zeros_like(w), gram).sum()) for w in (weight, lost))
    ranks = sorted({int(c.rank) for c in menu.candidates if c.rank != "dense"})
    spectrum = solve(lost, Regression(gram, lost).metric()) if ranks else None
    left = {str(rank): spectrum.relative_error(rank) ** 2 for rank in ranks} if spectrum is not None else {}
    return (noise / energy if energy > 0 else 0.0), left
