"""The registry of refiners. A refiner is one function with this decorator, in its own file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from slimrank.linalg.regression import Regression
from slimrank.options import options_of, validated
from slimrank.registry import Registry

Refine = Callable[..., tuple[Tensor, Tensor]]


class RefineOptions(BaseModel):
    """Options of the pass that refines: every refiner has them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    anchor: Annotated[
        float,
        Field(ge=0, le=1, description="1: outputs of the original model are the target; 0: those of the original "
              "weight on the compressed model's inputs (self); between: a mixture."),
    ] = 0.5  # fmt: skip
    ridge: Annotated[
        Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto"],
        Field(description="Pull towards the original weight, in units of the input energy; auto: cross-validated for "
              "each layer on halves of the text."),
    ] = 1e-3  # fmt: skip
    ridge_unit: Annotated[
        Literal["diagonal", "identity"],
        Field(description="Unit of the ridge: the energy of each input channel, or their mean for all."),
    ] = "diagonal"
    bias: Annotated[
        Literal["none", "existing", "all"],
        Field(description="Compensate the mean error by biases: those that exist, or new ones as well."),
    ] = "none"
    true_sequential: Annotated[
        bool,
        Field(description="Solve for the layers of a block in the order in which they run, each on the outputs of the "
              "refined ones before it; false: all at once, on the outputs of unrefined factors."),
    ] = True  # fmt: skip
    held_out: Annotated[
        int,
        Field(
            ge=0,
            description="Search windows on which a refined block must not be farther from the original than the "
            "unrefined one, else it is undone; 0: no check.",
        ),
    ] = 4
    residual: Annotated[
        bool,
        Field(description="Layers that add to the residual stream also compensate its error there (by the anchor)."),
    ] = True
    metric: Annotated[
        Literal["method", "outputs"],
        Field(description="Measure errors in the method's form on the outputs (kfac_svd: of gradients), or plainly."),
    ] = "method"
    samples_factor: Annotated[
        int,
        Field(
            ge=1,
            description="Windows to refine on, in multiples of the calibration windows; above 1 these are others, "
            "spread evenly over the text.",
        ),
    ] = 1
    stack_of_batch: Annotated[
        int, Field(ge=1, description="Windows averaged, position by position, into one (1 is exact).")
    ] = 1


COMMON = ("anchor", "held_out", "residual", "ridge", "ridge_unit", "bias", "samples_factor", "true_sequential")


@dataclass(frozen=True)
class Refiner:
    """A closed-form update.

    Attributes:
        id: its name in recipes.
        title: one line for people.
        paper: its source.
        changes_a: whether A changes, too; if so it cannot be combined with methods whose targets share A.
        refine: (problem, weight m x n, A, B, **options) -> A, B. B is solved for again after A is cast.
        options: their names, types, ranges and defaults, those of `RefineOptions` included.
    """

    id: str
    title: str
    paper: str
    changes_a: bool
    refine: Refine
    options: type[BaseModel]

    def configured(self, given: Mapping[str, Any]) -> ConfiguredRefiner:
        """Return the refiner with these options.

        Raises:
            RecipeError: an unknown option, or a value out of range.
        """
        chosen = validated(self.options, given, f"the refiner '{self.id}'").model_dump()
        following = RefineOptions(**{name: chosen.pop(name) for name in RefineOptions.model_fields if name in chosen})
        return ConfiguredRefiner(self, chosen, following)


@dataclass(frozen=True)
class ConfiguredRefiner:
    """A refiner with its options."""

    refiner: Refiner
    options: Mapping[str, Any]
    following: RefineOptions

    @property
    def in_metric(self) -> bool:
        """Tell whether errors are measured in the method's form on the outputs."""
        return "metric" in self.refiner.options.model_fields and self.following.metric == "method"

    def refine(self, problem: Regression, weight: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return new factors."""
        return self.refiner.refine(problem, weight, A, B, **self.options)

    def described(self) -> dict[str, Any]:
        """Return all that a result depends on, for JSON."""
        return {"id": self.refiner.id, **self.options, **self.following.model_dump()}


REFINERS: Registry[Refiner] = Registry("slimrank.methods.refine", "refiner")


def refiner(
    id: str, title: str, paper: str, changes_a: bool, settings: tuple[str, ...] = COMMON
) -> Callable[[Refine], Refine]:
    """Register the decorated function as the refiner `id`; its keyword-only parameters are its options.

    Args:
        id: its name in recipes.
        title: one line for people.
        paper: its source.
        changes_a: it changes A, which layers may share, and not only B.
        settings: names of the common options (`RefineOptions`) that it takes besides its own.

    Raises:
        TypeError: an option without an annotation or a default.
    """

    def register(refine: Refine) -> Refine:
        options = options_of(refine, {name: RefineOptions.model_fields[name] for name in settings})
        REFINERS.add(Refiner(id, title, paper, changes_a, refine, options))
        return refine

    return register
