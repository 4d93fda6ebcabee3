"""Refine: solve for the factors again, in closed form, on the inputs of each layer in the compressed model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimrank.errors import RecipeError
from slimrank.pipeline.forecast import Cost, Shape, group_widths
from slimrank.pipeline.stage import STAGES, Stage
from slimrank.pipeline.stages.allocate import search_windows
from slimrank.pipeline.stages.factorize import Factorizer, factorizing, marked
from slimrank.pipeline.stages.refinement import TITLE, Refinement
from slimrank.text.texts import WindowRequest

if TYPE_CHECKING:
    from slimrank.methods.refiner import ConfiguredRefiner
    from slimrank.pipeline.prepare import Choices, Prepared
    from slimrank.pipeline.state import State


@STAGES.add
class Refine(Stage):
    """Factorize the blocks in order, and refine each before the next."""

    id, order, title, factorizes = "refine", 50, TITLE, True

    def wanted(self, choices: Choices) -> bool:
        return choices.refiner is not None

    def check(self, choices: Choices) -> None:
        recipe, refiner = choices.recipe, choices.refiner
        if refiner is None:
            if recipe.refine_options:
                raise RecipeError("refine_options are given, but no refiner.", "--refine update, regress or ada_comp")
            return
        if refiner.refiner.changes_a and choices.method.method.groups:
            raise RecipeError(
                f"the refiner '{recipe.refine}' changes factors that '{recipe.method}' shares between layers.",
                "--refine update leaves them alone",
            )
        _check_windows(choices, refiner)

    def windows(self, choices: Choices) -> list[WindowRequest]:
        assert choices.refiner is not None
        recipe, following = choices.recipe, choices.refiner.following
        wanted = [WindowRequest("calibration", recipe.samples)]
        if following.held_out:
            wanted.append(search_windows(choices))
        if following.samples_factor > 1:
            wanted.append(WindowRequest("refinement", following.samples_factor * recipe.samples, spread=True))
        return wanted

    def cost(self, prepared: Prepared, shape: Shape) -> Cost:
        refiner = prepared.choices.refiner
        assert refiner is not None
        tokens = shape.tokens.get("refinement", shape.tokens.get("calibration", 0))
        judged = min(refiner.following.held_out, prepared.recipe.search_samples) * shape.seq_len
        judged *= shape.compressed_blocks
        sums = 3 * sum(8 * n * n for n in group_widths(shape.first))
        streams = 3 * tokens * shape.width * shape.compute_bytes
        stored = prepared.plan.stored_parameters + 2 * tokens * shape.width
        return Cost(
            products=5 * shape.forward(tokens) + shape.forward(judged),
            float32=4 * shape.grams(tokens) + shape.logits_of(judged),
            float64=factorizing(prepared, shape) + shape.decompose(),
            peak=shape.copies + streams + sums + shape.solving,
            stored=4 * stored if shape.resumable else 0,
        )

    def key(self, state: State) -> dict[str, Any]:
        assert state.prepared.choices.refiner is not None
        return {
            "refine": state.prepared.choices.refiner.described(),
            "dtype": str(state.prepared.dtype),
            "search": state.texts.digest("search"),
            "refinement": state.texts.digest("refinement"),
        }

    def run(self, state: State) -> None:
        if state.prepared.recipe.bits and not state.plan.factored():
            state.notes.append("no layer is factored, so none is refined")
            return
        state.notes += _fewer_held_out(state.prepared)
        refinement = Refinement(state, Factorizer(state), state.store(state.chained(self.id)))
        with marked(state):
            refinement.run()


def _check_windows(choices: Choices, refiner: ConfiguredRefiner) -> None:
    """Check that batches and windows suffice for the options of the refiner.

    Raises:
        RecipeError: they are not.
    """
    recipe, following = choices.recipe, refiner.following
    halves, windows = following.ridge == "auto", recipe.samples * following.samples_factor
    largest = min(recipe.batch_size, windows // 2) if halves else recipe.batch_size
    if following.stack_of_batch > max(1, largest):
        raise RecipeError(
            f"stack_of_batch averages windows of one batch; a batch has {largest}.",
            f"--batch-size {following.stack_of_batch}, and twice as many --samples with ridge=auto",
        )
    if halves and windows < 2:
        raise RecipeError(
            "ridge=auto fits on one half of the windows and tests on the other, but there is only one window.",
            "--samples 2 or more, or a number for the ridge",
        )


def _fewer_held_out(prepared: Prepared) -> list[str]:
    """Return a note where refined blocks are judged on fewer windows than were asked for."""
    assert prepared.choices.refiner is not None
    wanted, available = prepared.choices.refiner.following.held_out, prepared.recipe.search_samples
    if wanted <= available:
        return []
    return [f"refined blocks are judged on {available} windows, all that search_samples allows, not {wanted}"]
