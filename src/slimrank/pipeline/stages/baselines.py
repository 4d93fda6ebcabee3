"""Baselines: the original model in few bits and no more bytes than the result, measured beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from slimrank.errors import RecipeError
from slimrank.evaluate.quality import measure_quality
from slimrank.layers.forms import layer_form
from slimrank.models.placement import placed
from slimrank.pipeline.forecast import Cost, Shape
from slimrank.pipeline.stage import STAGES, Stage
from slimrank.pipeline.stages.quantization import Quantization
from slimrank.pipeline.stages.quantize import check_forms, check_library, quantize_options, rounding_cost
from slimrank.report.section import Section
from slimrank.text.texts import WindowRequest

if TYPE_CHECKING:
    from slimrank.pipeline.prepare import Choices, Prepared
    from slimrank.pipeline.state import State

BYTE_BITS = 8


@STAGES.add
class Baselines(Stage):
    """Round the original's weights as `quantize` does, measure that model, and put the weights back."""

    id, order, title = "baselines", 35, "measure a baseline"

    def wanted(self, choices: Choices) -> bool:
        return bool(choices.recipe.baselines)

    def check(self, choices: Choices) -> None:
        if not choices.recipe.baselines:
            return
        check_library()
        if choices.recipe.evaluation is None:
            raise RecipeError("a baseline is measured on an evaluation text, and there is none.", "--eval-text demo")

    def check_model(self, prepared: Prepared) -> None:
        for name in _forms(prepared):
            check_forms(prepared.targets, {target.path: (name, 0) for target in prepared.targets})

    def windows(self, choices: Choices) -> list[WindowRequest]:
        return [WindowRequest("calibration", choices.recipe.samples)]

    def cost(self, prepared: Prepared, shape: Shape) -> Cost:
        rounding = rounding_cost(prepared, shape)
        return replace(rounding, float32=rounding.float32 + shape.through(shape.tokens.get("evaluation", 0)))

    def key(self, state: State) -> dict[str, Any]:
        return {}

    def run(self, state: State) -> Section:
        forms = {name: dense_bytes(state.prepared, name) for name in _forms(state.prepared)}
        mine = state.prepared.size.linears(state.plan)
        fitting = {name: size for name, size in forms.items() if size <= mine}
        if not fitting:
            return _section((), f"No width among the baselines is as small as the result, {mine:,} bytes.")
        form = max(fitting, key=lambda name: fitting[name])
        found = _measured(state, form, self.title)
        row = form.partition(":")[2], f"{fitting[form]:,}", f"{found:.3f}", f"{found / _before(state):.4f}"
        return _section((row,), f"The linears of the result take {mine:,} bytes.")


def dense_bytes(prepared: Prepared, form: str) -> int:
    """Count the bytes of all targets in a form of dense weights."""
    sizes = prepared.size.itemsizes
    bits = (layer_form(form).bits(*t.shape, "dense", BYTE_BITS * sizes[t.path]) for t in prepared.targets)
    return -(-sum(bits) // BYTE_BITS)


def _forms(prepared: Prepared) -> list[str]:
    return [f"dense:{prepared.recipe.scheme(bits)}" for bits in prepared.recipe.baselines]


def _measured(state: State, form: str, title: str) -> float:
    """Return the perplexity of the model with all targets in this form; the model is as before afterwards."""
    originals = {t.path: state.model.get_submodule(t.path) for t in state.prepared.targets}
    options = quantize_options({})
    try:
        key = {**state.chained("calibrate"), "baseline": form, "options": options.model_dump()}
        Quantization(state, options, state.store(key), dict.fromkeys(originals, form)).run(title)
        with placed([state.model], state.prepared.device, upcast=False):
            found = measure_quality(
                state.model, state.inputs.tokenizer, state.texts["evaluation"], state.texts.bos, state.progress
            )
    finally:
        for path, layer in originals.items():
            state.model.set_submodule(path, layer)
    return float(found["perplexity"]["perplexity"])


def _before(state: State) -> float:
    return float(state.results.before["perplexity"]["perplexity"])


def _section(rows: tuple[tuple[str, ...], ...], note: str) -> Section:
    columns = ("dense weights in", "bytes of the linears", "perplexity", "of the original's")
    return Section(stage=Baselines.id, title="The original in few bits", columns=columns, rows=rows, note=note)
