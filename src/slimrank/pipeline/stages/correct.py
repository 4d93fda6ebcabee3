"""Correct: move all factors at once against the divergence of the whole model from the original."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimrank.errors import RecipeError
from slimrank.pipeline.forecast import Cost, Shape
from slimrank.pipeline.stage import STAGES, Stage
from slimrank.pipeline.stages.allocate import search_windows
from slimrank.pipeline.stages.correction import REMEMBER, TITLE, Correction
from slimrank.text.texts import WindowRequest

if TYPE_CHECKING:
    from slimrank.pipeline.prepare import Choices, Prepared
    from slimrank.pipeline.state import State


@STAGES.add
class Correct(Stage):
    """Make the rounds of correction that the recipe asks for."""

    id, order, title, before_title = "correct", 60, TITLE, REMEMBER

    def wanted(self, choices: Choices) -> bool:
        return choices.recipe.corrections > 0

    def check(self, choices: Choices) -> None:
        recipe = choices.recipe
        if recipe.corrections and choices.method.method.groups:
            raise RecipeError(
                f"corrections change factors that '{recipe.method}' shares between layers.",
                "leave out --corrections, or take a method that does not share",
            )

    def windows(self, choices: Choices) -> list[WindowRequest]:
        recipe = choices.recipe
        count = recipe.corrections * recipe.correction_windows
        calibration = WindowRequest("calibration", recipe.samples)
        return [calibration, search_windows(choices), WindowRequest("correction", count, disjoint=True)]

    def cost_before(self, prepared: Prepared, shape: Shape) -> Cost:
        return Cost(products=shape.forward(_tokens(prepared, shape)))

    def cost(self, prepared: Prepared, shape: Shape) -> Cost:
        tokens, rounds = _tokens(prepared, shape), prepared.recipe.corrections
        stored = 2 * prepared.plan.stored_parameters
        stored += (rounds + shape.blocks) * (tokens // rounds) * shape.width
        return Cost(
            products=4 * shape.forward(tokens),
            float32=4 * shape.logits_of(tokens),
            float64=rounds * sum(_step_operations(*t.shape) for t in shape.targets),
            stored=4 * stored,
        )

    def key(self, state: State) -> dict[str, Any]:
        drawn = state.texts.digest("correction"), state.prepared.recipe.correction_windows
        return {
            "dtype": str(state.prepared.dtype),
            "search": state.texts.digest("search"),
            "corrections": drawn,
        }

    def before_factorizing(self, state: State) -> None:
        self.correction = Correction(state, state.store(state.chained(self.id)))
        self.correction.remember()

    def run(self, state: State) -> None:
        state.results.corrections = self.correction.run()


def _tokens(prepared: Prepared, shape: Shape) -> int:
    return prepared.recipe.corrections * prepared.recipe.correction_windows * shape.seq_len


def _step_operations(m: int, n: int) -> float:
    """Count the operations of the tangent step of an m x n weight."""
    k = min(m, n)
    return n**3 / 3 + 2 * m * n * n + 6 * k * m * n + 4 * k**3
