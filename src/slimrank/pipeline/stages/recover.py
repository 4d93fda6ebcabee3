"""Recover: train the compressed model towards the original, before its weights are rounded."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from slimrank.errors import RecipeError
from slimrank.methods.recoverer import RECOVERERS, ConfiguredRecoverer
from slimrank.models.placement import placed
from slimrank.pipeline.forecast import Cost, Shape
from slimrank.pipeline.stage import STAGES, Stage
from slimrank.recovery.cost import Sizes, expected_tokens, training_cost
from slimrank.recovery.machine import Machine
from slimrank.recovery.precision import computes_bfloat16
from slimrank.recovery.recovering import run_phases
from slimrank.recovery.request import Recovery
from slimrank.recovery.text import check_text, training_text
from slimrank.report.section import Section

if TYPE_CHECKING:
    from slimrank.budget.planned_target import PlannedTarget
    from slimrank.pipeline.prepare import Choices, Prepared
    from slimrank.pipeline.state import State


@STAGES.add
class Recover(Stage):
    """Train the model as `slimrank recover` does; a copy of the original is its teacher."""

    id, order, title = "recover", 62, "recover"

    def wanted(self, choices: Choices) -> bool:
        return choices.recipe.recover is not None

    def check(self, choices: Choices) -> None:
        recipe = choices.recipe
        if recipe.recover is None:
            if recipe.recover_options or recipe.recover_text is not None:
                raise RecipeError("options of recovery are given, but nothing is recovered.", "--recover distill")
            return
        _method(choices)
        check_text(_asked(choices).model_copy(update={"evaluation": ()}))

    def cost(self, prepared: Prepared, shape: Shape) -> Cost:
        method, stored = _method(prepared.choices), prepared.plan.stored_parameters
        fewer = prepared.targets.coverage.targets - stored
        sizes = Sizes(
            original=shape.matrices,
            student=shape.matrices - fewer,
            sides=sum(_sides(target) for target in prepared.plan.targets.values()),
            whole=shape.parameters - fewer,
            head=shape.head,
            vocabulary=shape.vocabulary,
        )
        tokens, distinct = expected_tokens(_asked(prepared.choices), method.training)
        cost = training_cost(sizes, method, tokens, shape.seq_len, distinct)
        teacher = shape.itemsize * shape.parameters
        released = shape.itemsize * shape.matrices if cost.predictions else 0
        return Cost(
            **{"float32" if method.training.compute_dtype == "float32" else "mixed": cost.operations},
            peak=max(cost.peak + teacher - released, cost.before + teacher),
            stored=cost.stored,
        )

    def key(self, state: State) -> dict[str, Any]:
        asked = _asked(state.prepared.choices)
        return {"recover": asked.model_dump(mode="json", exclude={"evaluation", "windows", "report_to"})}

    def before_factorizing(self, state: State) -> None:
        self.teacher = copy.deepcopy(state.model).requires_grad_(False)

    def run(self, state: State) -> Section:
        choices = state.prepared.choices
        method, asked, recipe = _method(choices), _asked(choices), state.prepared.recipe
        assert recipe.seq_len is not None
        reader = state.model, state.inputs.tokenizer
        text = training_text(asked, method.training, reader, recipe.seq_len)
        folder = state.store(state.chained(self.id)).folder
        device = state.prepared.device
        bfloat16 = computes_bfloat16(method.training, device)
        machine = Machine(folder, device, bfloat16, asked.seed, teacher_again=False)
        with (
            state.timed(self.title, 0),
            placed([] if method.method.by_block else [state.model, self.teacher], device, upcast=False),
        ):
            phases = run_phases(state.model, self.teacher, text, method, machine, state.progress)
        del self.teacher
        rows = tuple(phase.row() for phase in phases)
        columns = ("trained", "parameters", "tokens", "tokens/s", "held-out loss before", "after", "kept")
        note = f"{method.method.title}; on '{asked.text}'. Losses are nats a token."
        if phases and phases[0].stored:
            note += " Predictions of the original: {:,} bytes on disk, stored in {:,.0f} s before.".format(
                *phases[0].stored
            )
        return Section(stage=self.id, title="Recovery", columns=columns, rows=rows, note=note)


def _sides(target: PlannedTarget) -> int:
    rank = 0 if target.rank == "dense" else target.rank
    return sum(target.shape) + 2 * rank


def _method(choices: Choices) -> ConfiguredRecoverer:
    return RECOVERERS.get(str(choices.recipe.recover)).configured(choices.recipe.recover_options)


def _asked(choices: Choices) -> Recovery:
    """Return what is asked of recovery; its text is that of calibration, unless the recipe names another."""
    recipe = choices.recipe
    text = recipe.recover_text if recipe.recover_text is not None else recipe.calibration
    if not isinstance(text, str):
        raise RecipeError("documents given as a list are not trained on.", "recover_text='FILE'")
    chosen = {
        "method": recipe.recover,
        "options": recipe.recover_options,
        "text": text,
        "seed": recipe.seed,
        "chat": recipe.chat,
    }
    return Recovery.make(chosen)
