"""Quantize: round weights to integers, block by block, each on its inputs in the model that is rounded so far."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from slimrank.checkpoint.save import mark_model
from slimrank.errors import ModelError, RecipeError
from slimrank.layers.quantized_forms import quantized_form
from slimrank.methods.quantize_options import QuantizeOptions
from slimrank.models.targets import TargetSet
from slimrank.options import validated
from slimrank.pipeline.forecast import Cost, Shape, group_widths
from slimrank.pipeline.stage import STAGES, Stage
from slimrank.pipeline.stages.quantization import Quantization
from slimrank.text.texts import WindowRequest

if TYPE_CHECKING:
    from slimrank.pipeline.prepare import Choices, Prepared
    from slimrank.pipeline.state import State

ROUNDING = 12  # operations per weight and column, of rounding in an order and of two sweeps of improvement
LIBRARY = "compressed_tensors"


@STAGES.add
class Quantize(Stage):
    """Round the weights of all targets whose form says so."""

    id, order, title = "quantize", 65, "quantize"

    def wanted(self, choices: Choices) -> bool:
        return choices.recipe.quantizes

    def check(self, choices: Choices) -> None:
        recipe = choices.recipe
        options = quantize_options(recipe.quantize_options)
        if not recipe.quantizes:
            if recipe.quantize_options:
                raise RecipeError("quantize_options are given, but nothing is quantised.", "--quantize int8")
            return
        check_library()
        if choices.method.method.groups:
            raise RecipeError(f"'{recipe.method}' shares factors between layers, which are not quantised.", _NO_SHARING)
        if options.rounding == "nearest" and recipe.quantize:
            _check_nearest(recipe.quantized_as())

    def check_model(self, prepared: Prepared) -> None:
        forms = prepared.plan.quantized()
        check_forms(prepared.targets, {path: (form, _rank(prepared, path)) for path, form in forms.items()})

    def windows(self, choices: Choices) -> list[WindowRequest]:
        nearest = not choices.recipe.bits and quantize_options(choices.recipe.quantize_options).rounding == "nearest"
        return [] if nearest else [WindowRequest("calibration", choices.recipe.samples)]

    def cost(self, prepared: Prepared, shape: Shape) -> Cost:
        return rounding_cost(prepared, shape)

    def key(self, state: State) -> dict[str, Any]:
        recipe = state.prepared.recipe
        return {
            "quantized": state.plan.quantized(),
            "quantize": quantize_options(recipe.quantize_options).model_dump(),
            "dtype": str(state.prepared.dtype),
            "refinement": state.texts.digest("refinement"),
        }

    def run(self, state: State) -> None:
        options = quantize_options(state.prepared.recipe.quantize_options)
        work = Quantization(state, options, state.store(state.chained(self.id)), state.plan.quantized())
        work.run(self.title)
        mark_model(state.model)
        for path, error in work.errors.items():
            state.results.rows[path]["rounded"] = error


def _rank(prepared: Prepared, path: str) -> int:
    rank = prepared.plan.targets[path].rank
    return 0 if rank == "dense" else rank


def check_forms(targets: TargetSet, forms: Mapping[str, tuple[str, int]]) -> None:
    """Refuse targets that cannot be rounded.

    Args:
        targets: of the model.
        forms: target -> its form, and its rank there.

    Raises:
        ModelError: layers that are tied, or groups that do not divide a layer.
    """
    for target in targets:
        if target.path not in forms:
            continue
        if target.ties:
            raise ModelError(
                f"'{target.path}' is tied to '{target.ties[0]}', and tied layers are not quantised.",
                f"--ignore '{target.path}'",
            )
        name, rank = forms[target.path]
        for part in quantized_form(name).parts(*target.shape, rank):
            if part.scheme is not None and not part.is_whole:
                raise ModelError(
                    f"groups of {part.scheme.group} do not divide the {part.columns} columns of a part of "
                    f"'{target.path}' ({name}).",
                    "another group, ranks that are multiples of it, or none: --quantize int8",
                )


def rounding_cost(prepared: Prepared, shape: Shape) -> Cost:
    """Estimate what it takes to round all targets."""
    tokens = shape.tokens.get("refinement", shape.tokens.get("calibration", 0))
    sums = 3 * sum(8 * n * n for n in group_widths(shape.first))
    streams = 3 * tokens * shape.width * shape.compute_bytes
    return Cost(
        products=5 * shape.forward(tokens),
        float32=4 * shape.grams(tokens),
        float64=sum(ROUNDING * t.parameters * t.shape[1] for t in shape.targets),
        peak=shape.copies + streams + sums + shape.solving,
        stored=prepared.size.targets // 2 + 8 * tokens * shape.width if shape.resumable else 0,
    )


def check_library() -> None:
    """Make sure that quantised weights can be stored.

    Raises:
        RecipeError: the library that packs them is not installed.
    """
    if find_spec(LIBRARY) is None:
        raise RecipeError(
            "quantised weights are stored by the library compressed-tensors, which is not installed.",
            "pip install 'slimrank[quant]' (Python 3.11 or newer)",
        )


def quantize_options(given: dict[str, Any]) -> QuantizeOptions:
    """Return the options of rounding.

    Raises:
        RecipeError: an unknown option, or a value out of range.
    """
    made = validated(QuantizeOptions, given, "quantising")
    assert isinstance(made, QuantizeOptions)
    return made


def _check_nearest(form: str) -> None:
    """Refuse a form that rounding to the nearest destroys.

    Raises:
        RecipeError: it does.
    """
    made = quantized_form(form)
    if made.first.bits < made.least_nearest:
        raise RecipeError(
            f"rounding to the nearest with fewer than {made.least_nearest} bits destroys {made.base} layers.",
            "rounding=gptq, or --quantize int8",
        )


_NO_SHARING = "a method that does not share"
