"""The recipe: every option of a compression. YAML, flags and Python arguments all become this object."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

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
from slimrank.budget.ranks import Rank
from slimrank.errors import RecipeError, nearest
from slimrank.recipe_presets import PRESETS, read_options, with_balanced
from slimrank.recipe_values import (
    FORMER_NAMES,
    check_patterns,
    check_rank_bounds,
    form_name,
    renamed,
    scheme_name,
    split_parts,
)

BUDGETS = ("keep_ratio", "keep_total", "max_bytes", "plan")

Parts = Annotated[int | list[int] | Literal["qkv"], BeforeValidator(split_parts)]
Form = Annotated[str, BeforeValidator(form_name)]
Scheme = Annotated[str, BeforeValidator(scheme_name)]


def _option(panel: str, default: Any, description: str, flag: str = "", shape: str = "", **bounds: Any) -> Any:
    """Declare an option of a recipe and its flag.

    Args:
        panel: the group of the help that lists the flag.
        default: of the option.
        description: of the option; also the help of the flag.
        flag: its name, where it is not that of the option.
        shape: how to write one value of a repeatable flag, where it is not just the value.
        bounds: of the value, as pydantic takes them.
    """
    extra: dict[str, Any] = {"panel": panel, "flag": flag, "shape": shape}
    return Field(default, description=description, json_schema_extra=extra, **bounds)


_NAMED, _BY_PATTERN = "NAME=VALUE", "PATTERN=VALUE"

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
    keep_total: float | None = _how_small(None, "Fraction of the whole model's parameters to keep.", gt=0, le=1)
    max_bytes: int | None = _how_small(None, "Largest size of all weights on disk, in bytes.", gt=0)
    plan: str | RankPlan | None = _how_small(
        None, "A rank plan (a JSON file from 'slimrank plan --save') to follow, instead of a budget."
    )
    method: str = _what(
        "svd_llm",
        "Decomposition method, used alone: see 'slimrank methods'. Without it, options that you do not give come from "
        "the preset balanced.",
    )
    method_options: dict[str, Any] = _what(
        {}, "Options of the method: see 'slimrank methods ID'.", flag="--option", shape=_NAMED
    )
    refine: str | None = _what(
        None, "Closed-form update of the factors after truncation: see 'slimrank methods'; or none."
    )
    refine_options: dict[str, Any] = _what(
        {}, "Options of the refiner: see 'slimrank methods ID'.", flag="--refine-option", shape=_NAMED
    )
    corrections: int = _what(
        0, "Rounds that move all factors against the gradient of the divergence from the original.", ge=0
    )
    correction_windows: int = _what(16, "Windows of one round of correction.", ge=1)
    stages: dict[str, dict[str, Any]] = _what(
        {},
        "Your own stages to run, and their options: see docs/extending.md.",
        flag="--stage",
        shape="NAME, or NAME={OPTION: VALUE}",
    )
    allocation: str = _what("uniform", "Rank allocation: see 'slimrank methods'.")
    allocation_options: dict[str, Any] = _what(
        {}, "Options of the allocation: see 'slimrank methods ID'.", flag="--allocation-option", shape=_NAMED
    )
    ranks: dict[str, str | int] = _what(
        {},
        "Bounds of ranks by pattern: N, MIN..MAX (either may be left out), or dense.",
        flag="--rank",
        shape=_BY_PATTERN,
    )
    form: Form = _what(
        "pair",
        "Form that ranks are chosen for and stored in: pair (two thin factors), or pivot (fewer parameters at the "
        "same rank).",
    )
    store_form: Form | None = _what(
        None, "Smaller form to store ranks in that were chosen for pairs: pivot. The model computes the same."
    )
    quantize: Scheme | None = _what(
        None,
        "Round the weights of all targets to integers: int8, int4-g64 (groups of 64 columns), int4-g64-sym (no zero "
        "points). Ranks are multiples of the group.",
    )
    quantize_options: dict[str, Any] = _what(
        {}, "Options of rounding: see docs/quantization.md.", flag="--quantize-option", shape=_NAMED
    )
    rank_multiple: int = _what(1, "Make ranks multiples of this: 8 or 16 suit GPUs.", ge=1)
    targets: tuple[str, ...] = _what(
        (), "Compress only layers that match a pattern: '*.mlp.*', 'q_proj', 're:...'.", flag="--target"
    )
    ignore: tuple[str, ...] = _what((), "Do not compress layers that match a pattern.")
    split: dict[str, Parts] = _what(
        {},
        "Treat a fused layer as several layers, by pattern: 2 (equal parts), [64,32,32] (outputs of each), or qkv.",
        shape=_BY_PATTERN,
    )
    calibration: str | tuple[str, ...] = _text(
        "demo",
        "Text to calibrate on: a .txt, .jsonl, .json or .parquet file, a folder, hub:ID[:CONFIG[:SPLIT]], demo, or "
        "self (the model writes it). Use text like your own.",
    )
    samples: int = _text(128, "Calibration windows.", ge=1)
    search_samples: int = _text(16, "Held-out windows that allocations measure plans on.", ge=1)
    seq_len: int | None = _text(
        None, "Tokens per window, in calibration and evaluation; by default 512, or the model's context.", ge=2
    )
    batch_size: int = _text(8, "Windows that run through a block at once.", ge=1)
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
    resident: bool = _where(False, "Keep the whole model on the device instead of one block at a time.")
    max_shard_size: str = _where("5GB", "Size of the largest weight file.", pattern=r"^\d+(KB|MB|GB)$")

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
        if self.plan is not None and (self.ranks or self.rank_multiple > 1):
            raise ValueError("a plan fixes the ranks; ranks and rank_multiple cannot be given with it")
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
        return self.quantize is not None or bool(plan and plan.quantized())

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
