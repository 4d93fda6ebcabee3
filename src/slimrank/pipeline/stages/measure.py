"""Measure the original model, and later the compressed one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimrank.evaluate.memory import peak_memory
from slimrank.evaluate.quality import measure_quality, reported_metrics
from slimrank.models.placement import placed
from slimrank.pipeline.forecast import Cost, Shape
from slimrank.pipeline.stage import STAGES, Stage
from slimrank.report.record import Side
from slimrank.text.texts import WindowRequest

if TYPE_CHECKING:
    from slimrank.pipeline.prepare import Choices, Prepared
    from slimrank.pipeline.state import State

LOGIT_BYTES = 12  # of one logit, with the copies that a loss takes


class _Measure(Stage):
    """Measure the model as it is.

    Speeds are not measured: before and after would be minutes apart, on a machine that changes.
    """

    def wanted(self, choices: Choices) -> bool:
        return True

    def windows(self, choices: Choices) -> list[WindowRequest]:
        recipe = choices.recipe
        return [] if recipe.evaluation is None else [WindowRequest("evaluation", recipe.windows, source="evaluation")]

    def cost(self, prepared: Prepared, shape: Shape) -> Cost:
        tokens = shape.tokens.get("evaluation", 0)
        return Cost(float32=shape.through(tokens), peak=LOGIT_BYTES * shape.logits if tokens else 0)

    def key(self, state: State) -> dict[str, Any]:
        return {}

    def measure(self, state: State, known: dict[str, Any]) -> dict[str, Any]:
        """Measure what is not known already; nothing without an evaluation text.

        Raises:
            ValidationError: a metric from outside gives a record that reports cannot show.
        """
        windows = state.texts.get("evaluation")
        with state.timed(self.title, 0 if windows is None else len(windows)):
            if windows is None:
                return {}
            device = state.prepared.device
            with placed([state.model], device, upcast=False):
                fresh = known or measure_quality(
                    state.model, state.inputs.tokenizer, windows, state.texts.bos, state.progress
                )
            found = {**fresh, "peak_memory": peak_memory(device)}
            Side.model_validate(found)  # here, and not when hours of work are about to be reported
            return found


@STAGES.add
class MeasureBefore(_Measure):
    """Measure the original model, unless the run directory holds its measurements already."""

    id, order, title = "measure_before", 10, "measure the original"

    def run(self, state: State) -> None:
        store = state.store(
            {
                **state.inputs.identity(),
                "original": state.texts.digest("evaluation"),
                "metrics": reported_metrics(),  # what was stored before a metric was registered lacks it
                "dtype": str(state.prepared.dtype),
                "device": str(state.prepared.device),
            }
        )
        known = store.load("original")[1] if store.has("original") else {}
        state.results.before = self.measure(state, known)
        store.save("original", {}, state.results.before)


@STAGES.add
class MeasureAfter(_Measure):
    """Measure the compressed model."""

    id, order, title = "measure_after", 90, "measure the result"

    def run(self, state: State) -> None:
        state.results.after = self.measure(state, {})
