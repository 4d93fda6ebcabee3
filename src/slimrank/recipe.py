"""The recipe: everything a compression is made of. The same object stands behind YAML, flags and Python."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)

from slimrank.budget.rank_plan import RankPlan
from slimrank.errors import RecipeError, nearest
from slimrank.recipe_values import check_patterns, check_rank_bounds, form_name, split_parts

PRESETS = Path(__file__).parent / "recipes"
BUDGETS = ("keep_ratio", "keep_total", "max_bytes", "plan")
FORMER_NAMES = {"factor_form": "form", "secondary": "store_form"}

Parts = Annotated[int | list[int] | Literal["qkv"], BeforeValidator(split_parts)]
Form = Annotated[str, BeforeValidator(form_name)]


def _option(panel: str, default: Any, description: str, flag: str = "", **bounds: Any) -> Any:
    """Declare an option: its description is also the help of its flag, which stands in a panel of the help."""
    extra: dict[str, Any] = {"panel": panel, "flag": flag}
    return Field(default, description=description, json_schema_extra=extra, **bounds)


_how_small = partial(_option, "How small")
_what = partial(_option, "What to compress")
_text = partial(_option, "Text")
_where = partial(_option, "Where and how")


class Recipe(BaseModel):
    """What to do, validated. Unknown keys are errors; see each field's description."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keep_ratio: float | None = _how_small(
        None, "Fraction of the linears' parameters to KEEP: 0.8 keeps 80 %.", flag="--keep", gt=0, le=1
    )
    keep_total: float | None = _how_small(
        None, "Fraction of the whole model's parameters to keep, instead of keep_ratio.", gt=0, le=1
    )
    max_bytes: int | None = _how_small(
        None, "Largest size of all weights on disk in bytes, instead of keep_ratio.", gt=0
    )
    plan: str | RankPlan | None = _how_small(
        None, "A rank plan (a JSON file from 'slimrank plan --save') to follow, instead of a budget."
    )
    method: str = _what(
        "svd_llm",
        "Decomposition method by itself: see 'slimrank methods'. Without one, options that are not given are those "
        "of the preset balanced.",
    )
    method_options: dict[str, Any] = _what({}, "Options of the method: see 'slimrank methods ID'.", flag="--option")
    refine: str | None = _what(
        None, "Closed-form update of the factors after truncation: see 'slimrank methods'; or none."
    )
    refine_options: dict[str, Any] = _what(
        {}, "Options of the refiner: see 'slimrank methods ID'.", flag="--refine-option"
    )
    corrections: int = _what(
        0, "Rounds that move all factors against the gradient of the divergence from the original.", ge=0
    )
    correction_windows: int = _what(16, "Windows of one round of correction.", ge=1)
    stages: dict[str, dict[str, Any]] = _what(
        {}, "Further stages to run, registered from outside, and their options (docs/extending.md).", flag="--stage"
    )
    allocation: str = _what("uniform", "Rank allocation: see 'slimrank methods'.")
    allocation_options: dict[str, Any] = _what(
        {}, "Options of the allocation: see 'slimrank methods ID'.", flag="--allocation-option"
    )
    ranks: dict[str, str | int] = _what(
        {}, "Bounds of ranks by pattern: N, MIN..MAX (either may be left out), or dense.", flag="--rank"
    )
    form: Form = _what(
        "pair",
        "What ranks are chosen for and stored as: pair (two thin factors), or pivot (fewer parameters at the same "
        "rank).",
    )
    store_form: Form | None = _what(
        None, "Store ranks that were chosen for pairs in a smaller form: pivot. The model stays the same."
    )
    rank_multiple: int = _what(1, "Make ranks multiples of this: 8 or 16 suit GPUs.", ge=1)
    targets: tuple[str, ...] = _what(
        (), "Compress only layers that match a pattern: '*.mlp.*', 'q_proj', 're:...'.", flag="--target"
    )
    ignore: tuple[str, ...] = _what((), "Leave layers as they are that match a pattern.")
    split: dict[str, Parts] = _what(
        {}, "Treat fused layers as several, by pattern: 2 (equal parts), [64,32,32] (outputs of each), or qkv."
    )
    calibration: str | tuple[str, ...] = _text(
        "demo",
        "Text to calibrate on: a .txt, .jsonl, .json or .parquet file, a folder, hub:ID[:CONFIG[:SPLIT]], demo, or "
        "self (the model writes it). Use text like your own.",
    )
    samples: int = _text(128, "Calibration windows.", ge=1)
    search_samples: int = _text(16, "Held-out windows that allocations measure plans on; they do not calibrate.", ge=1)
    seq_len: int | None = _text(
        None, "Tokens per window, in calibration and evaluation; 512 or the model's context.", ge=2
    )
    batch_size: int = _text(8, "Windows that run through a block at a time.", ge=1)
    seed: int = _text(0, "Seed of the calibration windows, and of text that the model writes.", ge=0)
    evaluation: str | None = _text(
        "demo",
        "Text to measure perplexity on, before and after; null (--no-eval) measures nothing.",
        flag="--eval-text",
    )
    windows: int = _text(16, "Evaluation windows.", ge=1)
    device: str = _where("auto", "Where to compute: auto, cpu, cuda, mps, ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _where(
        "auto", "Stored dtype: auto (that of the checkpoint), float32, bfloat16 or float16."
    )
    resident: bool = _where(False, "Keep the whole model on the device, instead of one block at a time.")
    max_shard_size: str = _where("5GB", "Largest weight file to write.", pattern=r"^\d+(KB|MB|GB)$")

    @model_validator(mode="wrap")
    @classmethod
    def _complete(cls, data: Any, handler: ModelWrapValidatorHandler[Recipe]) -> Recipe:
        """Take former names; without a method, take what is not given from the preset `balanced`."""
        data = renamed(data) if isinstance(data, Mapping) else data
        if not isinstance(data, dict) or "method" in data:
            return handler(data)
        made = handler(_filled(data))
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
        if self.plan is not None and (self.ranks or self.rank_multiple > 1):
            raise ValueError("ranks and rank_multiple are for an allocation; the ranks of a plan are fixed in it")
        if self.store_form and self.form != "pair":
            raise ValueError(f"store_form is for form pair; form {self.form} stores {self.form} layers by itself")
        return self

    @property
    def stored_as(self) -> str:
        """The form that factored targets are stored in."""
        return self.store_form or self.form

    @property
    def factor_form(self) -> str:
        """The former name of `form`."""
        return self.form

    @property
    def secondary(self) -> str | None:
        """The former name of `store_form`."""
        return self.store_form

    def described(self) -> dict[str, Any]:
        """Return the recipe for a report; texts given as a list are counted, not repeated."""
        fields = self.model_dump()
        if not isinstance(self.calibration, str):
            fields["calibration"] = f"{len(self.calibration)} documents given as a list"
        return fields

    def need_budget(self) -> None:
        """Make sure that the recipe says how small the model should get.

        Raises:
            RecipeError: it does not.
        """
        if all(getattr(self, name) is None for name in BUDGETS):
            raise RecipeError("nothing says how small the model should get.", "--keep 0.8 keeps 80 % of its linears")

    @classmethod
    def make(cls, options: Mapping[str, Any]) -> Recipe:
        """Make a recipe out of options.

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
        """Make a recipe with some of its options replaced; it must say how small the model should get.

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
            RecipeError: there is none of that name.
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
        try:
            options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(f"the recipe '{path}' cannot be read: {error.strerror}.", "give a YAML file") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecipeError(
                f"the recipe '{path}' is not YAML: {error}", "keys are the options, one a line"
            ) from error
        if not isinstance(options, dict):
            raise RecipeError(f"the recipe '{path}' holds no options.", "one 'option: value' a line")
        try:
            cls.make(options)
        except RecipeError as error:
            raise RecipeError(f"the recipe '{path}': {error.message}", error.hint) from error
        return renamed(options)


def renamed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options under their present names.

    Raises:
        RecipeError: an option under both its names.
    """
    both = [(old, new) for old, new in FORMER_NAMES.items() if old in options and new in options]
    if both:
        raise RecipeError(f"'{both[0][0]}' is the former name of '{both[0][1]}'; both are given.", "leave one out")
    return {FORMER_NAMES.get(name, name): value for name, value in options.items()}


@cache
def balanced_options() -> dict[str, Any]:
    """Return the options of the preset `balanced`."""
    options: dict[str, Any] = yaml.safe_load((PRESETS / "balanced.yaml").read_text(encoding="utf-8"))
    return options


def _filled(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return `data` and the options of the preset `balanced`, except those that something in `data` settles."""
    settled = set()
    if data.get("plan") is not None:
        settled |= {"allocation", "allocation_options", "form"}
    if data.get("store_form") is not None:
        settled |= {"form"}
    settled |= {f"{name}_options" for name in ("refine", "allocation") if name in data}
    filled = {name: value for name, value in balanced_options().items() if name not in settled} | dict(data)
    nested = {"method_options", "refine_options", "allocation_options"}
    for name in nested & balanced_options().keys() & data.keys() - settled:
        if isinstance(data[name], Mapping):
            filled[name] = {**balanced_options()[name], **data[name]}
    return filled
