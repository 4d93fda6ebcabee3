"""The contract of a stage: one step of a compression, in a file of its own.

`compress` prepares a recipe, sums the costs of its stages and runs them in order. `plan` does the same without weights:
it checks the stages and sums their costs. A stage registers itself with `STAGES.add`. One from outside the package runs
if a recipe names it (`stages: {NAME: {option: value}}`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from slimrank.errors import RecipeError, nearest
from slimrank.options import validated
from slimrank.registry import Registry
from slimrank.report.section import Section
from slimrank.text.texts import WindowRequest

if TYPE_CHECKING:
    from slimrank.pipeline.forecast import Cost, Shape
    from slimrank.pipeline.prepare import Choices, Prepared
    from slimrank.pipeline.state import State


class NoOptions(BaseModel):
    """The options of a stage that has none."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Stage:
    """One step of a compression. A subclass states its name and overrides what it needs.

    Attributes:
        id: its name in recipes, keys and reports.
        title: what it does, as progress and the seconds of a report name it.
        before_title: the same for what it does before the model is factorized; empty if it does nothing then.
        order: stages of a smaller order run first; those of slimrank have 10 to 60, and 90 measures the result.
        settings: the model of its options.
        factorizes: whether it replaces weights by factors.

    Args:
        options: the values of its options, validated against `settings`.
    """

    id: ClassVar[str]
    title: ClassVar[str]
    before_title: ClassVar[str] = ""
    order: ClassVar[int] = 70
    settings: ClassVar[type[BaseModel]] = NoOptions
    factorizes: ClassVar[bool] = False

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        self.options: Any = validated(self.settings, options or {}, f"the stage '{self.id}'")

    def wanted(self, choices: Choices) -> bool:
        """Tell whether a recipe asks for this stage; by default, whether it names it."""
        return self.id in choices.recipe.stages

    def check(self, choices: Choices) -> None:
        """Refuse what cannot work, before any work and without a model.

        Raises:
            RecipeError: options that cannot be combined.
        """

    def check_model(self, prepared: Prepared) -> None:
        """Refuse what cannot work for a model, before any work; its weights may be missing, its ranks provisional.

        Raises:
            SlimrankError: the model, or a plan for it, does not fit.
        """

    def windows(self, choices: Choices) -> list[WindowRequest]:
        """List the text windows that the stage uses."""
        return []

    def cost(self, prepared: Prepared, shape: Shape) -> Cost | None:
        """Estimate operations, peak memory and stored bytes; None if the stage does nothing for this recipe."""
        return None

    def cost_before(self, prepared: Prepared, shape: Shape) -> Cost | None:
        """Estimate what `before_factorizing` takes."""
        return None

    def key(self, state: State) -> dict[str, Any]:
        """Return everything about this stage that the results of later stages depend on."""
        return {self.id: self.options.model_dump(mode="json")}

    def is_done(self, state: State) -> bool:
        """Tell whether its results are stored already, so that it takes no time."""
        return False

    def before_factorizing(self, state: State) -> None:
        """Look at the original model, right before it is factorized."""

    def run(self, state: State) -> Section | None:
        """Do the work on `state.model`; return a section for the report, if there is something to report."""
        raise NotImplementedError


STAGES: Registry[Any] = Registry("slimrank.pipeline.stages", "stage")  # of subclasses of Stage


def stages_of(choices: Choices) -> tuple[Stage, ...]:
    """Return the stages that a recipe asks for, in order, and let each check it.

    Raises:
        RecipeError: an unknown stage or option, or options that cannot be combined.
    """
    own, known = choices.recipe.stages, STAGES.all()
    by_name = {name: kind for name, kind in known.items() if kind.wanted is Stage.wanted}
    for name in own.keys() - by_name.keys():
        hint = "other options ask for it" if name in known else _nearest_stage(name, by_name)
        raise RecipeError(f"there is no stage '{name}' that a recipe may name.", hint)
    stages = [kind(own.get(name)) for name, kind in known.items()]
    for stage in stages:
        stage.check(choices)
    return tuple(sorted((s for s in stages if s.wanted(choices)), key=lambda stage: (stage.order, stage.id)))


def _nearest_stage(name: str, known: dict[str, Any]) -> str:
    return nearest(name, known) if known else "install or import the package that registers it"
