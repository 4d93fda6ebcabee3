"""The recipe: every option of a compression. YAML, flags and Python arguments all become this object."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import (
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)

from slimrank.budget.rank_plan import RankPlan
from slimrank.budget.ranks import Rank
from slimrank.errors import RecipeError, nearest
from slimrank.linalg.scheme import Scheme
from slimrank.recipe_fields import RecipeFields
from slimrank.recipe_presets import PRESETS, read_options, with_balanced
from slimrank.recipe_values import (
    FORMER_NAMES,
    check_patterns,
    check_rank_bounds,
    renamed,
)

BUDGETS = ("keep_ratio", "keep_total", "max_bytes", "max_latency", "plan")


class Recipe(RecipeFields):
    """What to do, validated. Unknown keys are errors; see each field's description."""

    @model_validator(mode="wrap")
    @classmethod
    def _complete(cls, data: Any, handler: ModelWrapValidatorHandler[Recipe]) -> Recipe:
        """Accept former names; without a method, take what is not given from the preset `balanced`."""
        data = renamed(data) if isinstance(data, Mapping) else data
        if not isinstance(data, dict) or "method" in data:
            return handler(data)
        made = handler(with_balanced(data))
        object.__setattr__(made, "__pydantic_fields_set__", set(data))
        return made

    @field_validator("refine", mode="before")
    @classmethod
    def _none_by_name(cls, value: Any) -> Any:
        return None if value == "none" else value

    @field_validator("plan", "calibration", "evaluation", mode="before")
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    _patterns = field_validator("targets", "ignore", "ranks", "split")(check_patterns)
    _bounds = field_validator("ranks")(check_rank_bounds)

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give only one of {' and '.join(given)}")
        if self.plan is not None and (self.ranks or self.rank_multiple != 1 or self.kv_keep):
            raise ValueError("a plan fixes the ranks; ranks, rank_multiple and kv_keep cannot be given with it")
        if self.bits and self.quantize:
            raise ValueError("give only one of bits and quantize: widths that may be chosen, or one for all weights")
        if self.bits and given and given != ["max_bytes"]:
            raise ValueError("bits are chosen within a byte budget: give max_bytes")
        if self.forms != type(self).model_fields["forms"].default and not self.bits and self.plan is None:
            raise ValueError("forms are chosen together with bits: give bits")
        if self.bits and self.store_form:
            raise ValueError("bits choose the form of every layer: leave out store_form")
        if self.max_latency is not None and (self.quantize or self.store_form):
            raise ValueError("max_latency chooses ranks of one form: leave out quantize and store_form")
        if self.store_form and self.form != "pair":
            raise ValueError(
                f"store_form needs form pair; with form {self.form}, layers are stored as {self.form} already"
            )
        return self

    @property
    def stored_as(self) -> str:
        """Return the form that factored targets are stored in."""
        return self.store_form or self.form

    @property
    def quantizes(self) -> bool:
        """Tell whether weights become integers."""
        plan = RankPlan.load(self.plan) if isinstance(self.plan, str) else self.plan
        return bool(self.quantize or self.bits or (plan and plan.quantized()))

    def scheme(self, bits: int) -> Scheme:
        """Return how weights are rounded to so many bits, where bits are chosen, and in baselines."""
        return Scheme(bits, self.group_size or None, self.symmetric)

    def quantized_as(self, rank: Rank | None = None) -> str:
        """Return the form of targets whose weights are rounded by `quantize`; that of a dense weight, for its rank."""
        return f"{'dense' if rank == 'dense' else self.stored_as}:{self.quantize}"

    @property
    def factor_form(self) -> str:
        """Return `form`, by its former name."""
        return self.form

    @property
    def secondary(self) -> str | None:
        """Return `store_form`, by its former name."""
        return self.store_form

    def described(self) -> dict[str, Any]:
        """Return the recipe for a report; texts given as a list are counted, not repeated."""
        fields = self.model_dump()
        if not isinstance(self.calibration, str):
            fields["calibration"] = f"{len(self.calibration)} documents given as a list"
        return fields

    def need_budget(self) -> None:
        """Make sure that the recipe has a budget.

        Raises:
            RecipeError: it does not.
        """
        if all(getattr(self, name) is None for name in BUDGETS):
            raise RecipeError(
                "the recipe has no budget.",
                "--keep 0.8 (keep_ratio=0.8 in Python) keeps 80 % of the linears' parameters",
            )

    @classmethod
    def make(cls, options: Mapping[str, Any]) -> Recipe:
        """Make a recipe from options.

        Raises:
            RecipeError: an unknown option (the nearest known name is in the hint), or a value out of range.
        """
        for name in options:
            if name not in cls.model_fields and name not in FORMER_NAMES:
                raise RecipeError(f"there is no option '{name}'.", nearest(name, cls.model_fields))
        try:
            return cls.model_validate(renamed(options))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            message = first["msg"].removeprefix("Value error, ")
            got = f", got {first['input']!r}" if field else ""
            about = cls.model_fields[str(first["loc"][0])].description if field else "slimrank compress --help"
            raise RecipeError(f"{field + ': ' if field else ''}{message}{got}", about or "") from error

    @classmethod
    def merged(cls, recipe: Recipe | None, options: Mapping[str, Any]) -> Recipe:
        """Make a recipe with some of its options replaced; it must have a budget.

        Raises:
            RecipeError: see `make` and `need_budget`.
        """
        fields = {name: getattr(recipe, name) for name in recipe.model_fields_set} if recipe else {}
        made = cls.make({**fields, **renamed(options)})
        made.need_budget()
        return made

    @classmethod
    def preset(cls, name: str) -> dict[str, Any]:
        """Return the options of a shipped recipe.

        Raises:
            RecipeError: there is no preset of that name.
        """
        known = {path.name.removesuffix(".yaml"): path for path in PRESETS.glob("*.yaml")}
        if name not in known:
            raise RecipeError(f"there is no preset '{name}'.", nearest(name, known))
        return cls.read(known[name])

    @classmethod
    def read(cls, path: str | Path) -> dict[str, Any]:
        """Return the options in a YAML file, checked, under their present names.

        Raises:
            RecipeError: no such file, not YAML, not a mapping, or an unknown option; it names the file.
        """
        options = read_options(path)
        try:
            cls.make(options)
        except RecipeError as error:
            raise RecipeError(f"recipe '{path}': {error.message}", error.hint) from error
        return renamed(options)
