"""Measure rounding: what few bits lose of each weight's outputs, before form, rank and bits are chosen together."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slimrank.budget.menu import MEASURED_BITS, Family, Loss
from slimrank.budget.planned_target import KEEPS_WEIGHT
from slimrank.layers.dense import weight_of
from slimrank.layers.forms import layer_form
from slimrank.layers.quantized_forms import quantized_form
from slimrank.linalg.forms import Form
from slimrank.linalg.gptq import gptq
from slimrank.linalg.lowrank import Spectrum, solve
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
            products=2 * shape.forward(tokens),
            float32=shape.grams(tokens),
            float64=sum(4 * t.parameters * t.shape[1] * _trials(prepared, t) for t in shape.targets)
            + shape.decompose(),
            peak=shape.copies + 2 * tokens * shape.width * shape.compute_bytes + sums + shape.solving,
        )

    def key(self, state: State) -> dict[str, Any]:
        recipe = state.prepared.recipe
        return {"rounding": str(recipe.scheme(MEASURED_BITS)), "forms": recipe.forms, "bits": recipe.bits}

    def run(self, state: State) -> None:
        store, work = state.store(state.chained(self.id)), _Trial(state)
        blocks = range(len(work.runner))
        with state.timed(TITLE, len(blocks)):
            if not store.has("losses"):
                with work.runner.session():
                    work.streams.start()
                    found = [work.block(index) for index in blocks]
                store.save("losses", {}, {path: each for block in found for path, each in block.items()})
            for path, rows in store.load("losses")[1].items():
                state.results.losses[path] = {Family(form, rank): Loss(*loss) for form, rank, *loss in rows}


def _trials(prepared: Prepared, target: Target) -> int:
    """Count the roundings of a weight at most: of itself, and of its factors at each rank."""
    menus = prepared.problem.menus if prepared.problem is not None else {}
    families = menus[target.path].families if target.path in menus else []
    return 1 + sum(family.form.partition(":")[0] not in KEEPS_WEIGHT for family in families)


def _written(losses: Mapping[Family, Loss]) -> list[list[Any]]:
    """Return losses as rows for a file."""
    return [[family.form, family.rank, loss.at_four, loss.cut] for family, loss in losses.items()]


class _Trial:
    """Round the weights of each block on their inputs in the original model, which stays as it is."""

    def __init__(self, state: State) -> None:
        self.state, self.streams, self.spectra = state, DualStream.of(state, OWN_INPUTS), SpectrumStore(state)
        self.runner = self.streams.runner

    def block(self, index: int) -> dict[str, list[list[Any]]]:
        """Measure the weights of a block, and pass through it."""
        targets = {t.path: t for t in self.state.prepared.targets.in_block(index)}
        gathered = self.streams.gather(index, {}, list(targets), last=True)
        found = {}
        for path, target in targets.items():
            sums = [part for collector in gathered if (part := collector.of(path)) is not None]
            found[path] = _written(self._losses(target, sums[0].streams.inputs.gram if sums else None))
        self.streams.step(index)
        page_out(self.runner.blocks[index])
        self.state.progress.step()
        return found

    def _losses(self, target: Target, gram: Tensor | None) -> dict[Family, Loss]:
        """Return what each family of forms loses of a weight in 4 bits; those that dense weights beat are left out."""
        state, weight = self.state, weight_of(self.state.model.get_submodule(target.path))
        assert state.prepared.problem is not None
        weight = weight.to(state.prepared.solver, torch.float64)
        if gram is None:  # no token reached it: nothing would miss it
            gram = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
        trial = _Layer(self, target, weight, gram)
        menu = state.prepared.problem.menus[target.path]
        found = {family: loss for family in menu.families if (loss := trial.kept(family)) is not None}
        menu = menu.measured({family: loss for family, loss in found.items() if family.rank == "dense"})
        for family in menu.families:
            if family not in found and menu.worth_measuring(family, trial.cut(family)):
                found[family] = trial.factored(family)
        return found


class _Layer:
    """Trials of one weight.

    Args:
        work: knows the state and the spectra.
        target: of the weight.
        weight: m x n, float64.
        gram: of its inputs.
    """

    def __init__(self, work: _Trial, target: Target, weight: Tensor, gram: Tensor) -> None:
        self.target, self.weight, self.gram, self.spectra = target, weight, gram, work.spectra
        self.scheme, self.dtype = work.state.prepared.recipe.scheme(MEASURED_BITS), work.state.prepared.dtype
        self.unit = next(unit for unit in work.state.prepared.units if target in unit.targets)

    @cached_property
    def lost(self) -> Tensor:
        """Return what rounding the weight itself loses."""
        return self.weight - gptq(self.weight, self.gram, self.scheme, self.dtype, sweeps=0).values()

    @cached_property
    def correctable(self) -> Spectrum:
        """Return the spectrum of what is lost, in the metric of the inputs."""
        return solve(self.lost, Regression(self.gram, self.lost).metric())

    def energy(self, lost: Tensor) -> float:
        """Return the part of the energy that an error has, in the metric of the method."""
        return relative_energy(lost, self.weight, self.gram, self.spectra.row(self.target))

    def kept(self, family: Family) -> Loss | None:
        """Return the loss of a form that keeps the weight; None where factors replace it."""
        if family.form.partition(":")[0] not in KEEPS_WEIGHT:
            return None
        beside = 1.0 if family.rank == "dense" else self.correctable.relative_error(family.rank) ** 2
        return Loss(self._at_four * beside)

    @cached_property
    def _at_four(self) -> float:
        return self.energy(self.lost)

    def cut(self, family: Family) -> float:
        """Return what the rank of a family loses before anything is rounded."""
        return 0.0 if family.rank == "dense" else self.spectra.of(self.unit)[0].relative_error(family.rank) ** 2

    def factored(self, family: Family) -> Loss:
        """Round the factors for real; what that loses beyond their rank is what rounding loses."""
        assert family.rank != "dense"
        a, b = (factor.to(self.weight) for factor in self._factors(family.rank))
        form = quantized_form(family.form.format(self.scheme))
        start = layer_form(form.base).build(a, b, None, torch.float32)
        made: Any = form.fit(Regression(self.gram, self.weight @ self.gram), start, family.rank, self.dtype)
        rounded = made.weight.detach().to(self.weight)
        return Loss(max(0.0, self.energy(self.weight - rounded) - self.energy(self.weight - b @ a)), self.cut(family))

    def _factors(self, rank: int) -> tuple[Tensor, Tensor]:
        a, parts = self.spectra.factors(self.unit, rank)
        return a, parts[0]


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
