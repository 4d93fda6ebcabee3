"""The recipe: everything a compression is made of. The same object stands behind YAML, flags and Python."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
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

PRESETS = Path(__file__).parent / "recipes"
BUDGETS = ("keep_ratio", "keep_total", "max_bytes", "plan")


def _parts(value: Any) -> Any:
    sizes = value if isinstance(value, (list, tuple)) else [value]
    many = len(sizes) > 1 or (isinstance(value, int) and value > 1)
    if value != "qkv" and not (many and all(type(size) is int and size > 0 for size in sizes)):
        raise ValueError("neither so many equal parts (2 or more), nor the outputs of each ([64, 32]), nor qkv")
    return value


Parts = Annotated[int | list[int] | Literal["qkv"], BeforeValidator(_parts)]


class Recipe(BaseModel):
    """What to do, validated. Unknown keys are errors; see each field's description."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keep_ratio: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Fraction of the compressible weights' parameters to KEEP (0.8 keeps 80 %).",
    )
    keep_total: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Fraction of the whole model's parameters to keep, instead of keep_ratio.",
    )
    max_bytes: int | None = Field(
        None, gt=0, description="Largest size of all weights on disk in bytes, instead of keep_ratio."
    )
    plan: str | RankPlan | None = Field(
        None, description="A rank plan (or its JSON file) to use, instead of a budget and an allocation."
    )
    method: str = Field(
        "svd_llm",
        description="Decomposition method (see: slimrank methods). With one, all other options are as plain as they "
        "say here; without, they are those of the preset balanced.",
    )
    method_options: dict[str, Any] = Field({}, description="Options of the method by name (see: slimrank methods ID).")
    refine: str | None = Field(
        None, description="Closed-form update of the factors after the cut (see: slimrank methods), or none."
    )
    refine_options: dict[str, Any] = Field({}, description="Options of the refiner by name (see: slimrank methods ID).")
    corrections: int = Field(
        0,
        ge=0,
        description="Rounds that move all factors against the gradient of the divergence from the original model.",
    )
    correction_windows: int = Field(16, ge=1, description="Windows of one round, apart from those that calibrate.")
    stages: dict[str, dict[str, Any]] = Field(
        {}, description="Further stages to run by name, and their options (see docs/adding-a-stage.md)."
    )
    allocation: str = Field("uniform", description="Rank allocation (see: slimrank methods).")
    allocation_options: dict[str, Any] = Field(
        {}, description="Options of the allocation by name (see: slimrank methods ID)."
    )
    ranks: dict[str, str | int] = Field(
        {}, description="Rank of layers by pattern: a number, MIN..MAX (either may be left out), or dense."
    )
    factor_form: Literal["pair", "pivot"] = Field(
        "pair",
        description="What ranks are chosen for and stored as: two thin factors, or pivot layers, which hold a rank in "
        "fewer parameters (docs/pivot.md).",
    )
    secondary: Literal["pivot"] | None = Field(
        None, description="Store ranks that were chosen for pairs as pivot layers: the same model, yet smaller."
    )
    rank_multiple: int = Field(1, ge=1, description="Ranks are multiples of this (8 or 16 suit GPUs).")
    targets: tuple[str, ...] = Field((), description="Compress only layers that match one of these patterns.")
    ignore: tuple[str, ...] = Field((), description="Leave layers alone that match one of these patterns.")
    split: dict[str, Parts] = Field(
        {}, description="Treat fused layers as several: pattern -> so many equal parts, the outputs of each, or qkv."
    )
    calibration: str | tuple[str, ...] = Field(
        "demo",
        description="Calibration text: a file or folder, hub:ID[:CONFIG[:SPLIT]], demo, self, or a list of texts.",
    )
    samples: int = Field(128, ge=1, description="Calibration windows.")
    seq_len: int | None = Field(
        None,
        ge=2,
        description="Tokens per window, in calibration and evaluation; 512 or the model's context.",
    )
    batch_size: int = Field(8, ge=1, description="Windows that run through a block at a time.")
    search_samples: int = Field(
        16, ge=1, description="Windows that allocations measure plans on; none of them calibrates."
    )
    seed: int = Field(0, ge=0, description="Seed of the calibration windows (and of `self` text).")
    device: str = Field("auto", description="Where to compute: auto, cpu, cuda, mps, ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Stored dtype of the model; auto is that of the checkpoint."
    )
    resident: bool = Field(
        False,
        description="Keep the whole model on the device while calibrating, instead of one block at a time.",
    )
    evaluation: str | None = Field(
        "demo", description="Text to measure perplexity on, before and after; null measures nothing."
    )
    windows: int = Field(16, ge=1, description="Evaluation windows.")
    max_shard_size: str = Field("5GB", pattern=r"^\d+(KB|MB|GB)$", description="Largest weight file to write.")

    @model_validator(mode="wrap")
    @classmethod
    def _balanced(cls, data: Any, handler: ModelWrapValidatorHandler[Recipe]) -> Recipe:
        """Without a method, what is not given is that of the preset `balanced`."""
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

    @field_validator("targets", "ignore", "ranks", "split")
    @classmethod
    def _patterns(cls, value: Any) -> Any:
        for pattern in value:
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise ValueError(f"'{pattern}' is no regular expression: {error}") from error
        return value

    @field_validator("ranks")
    @classmethod
    def _limits(cls, value: dict[str, str | int]) -> dict[str, str | int]:
        for pattern, limit in value.items():
            if not re.fullmatch(r"dense|\d+|\d*\.\.\d*", str(limit)):
                raise ValueError(f"'{limit}' for '{pattern}' is neither a rank, nor MIN..MAX, nor dense")
            if re.search(r"(?<!\d)0+(?!\d)", str(limit)):
                raise ValueError(f"'{limit}' for '{pattern}': the smallest rank is 1")
            least, _, most = str(limit).partition("..")
            if least and most and int(least) > int(most):
                raise ValueError(f"'{limit}' for '{pattern}' leaves no rank: MIN is more than MAX")
        return value

    @model_validator(mode="after")
    def _one_budget(self) -> Recipe:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give only one of {' and '.join(given)}")
        return self

    @model_validator(mode="after")
    def _plan_decides(self) -> Recipe:
        if self.plan is not None and (self.ranks or self.rank_multiple > 1):
            raise ValueError("ranks and rank_multiple are for an allocation; the ranks of a plan are fixed in it")
        return self

    @model_validator(mode="after")
    def _one_form(self) -> Recipe:
        if self.secondary and self.factor_form == "pivot":
            raise ValueError("secondary is for factor_form pair; factor_form pivot stores pivot layers by itself")
        return self

    @property
    def stored_as(self) -> Literal["pair", "pivot"]:
        """What factored targets become."""
        return self.secondary or self.factor_form

    def described(self) -> dict[str, Any]:
        """The recipe for a report; texts given as a list are counted, not repeated."""
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
    def make(cls, options: dict[str, Any]) -> Recipe:
        """A recipe out of options.

        Raises:
            RecipeError: an unknown option (the nearest known name is in the hint), or a value out of range.
        """
        for name in options:
            if name not in cls.model_fields:
                raise RecipeError(f"there is no option '{name}'.", nearest(name, cls.model_fields))
        try:
            return cls.model_validate(options)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            message = first["msg"].removeprefix("Value error, ")
            got = f", got {first['input']!r}" if field else ""
            about = cls.model_fields[str(first["loc"][0])].description if field else "slimrank compress --help"
            raise RecipeError(f"{field + ': ' if field else ''}{message}{got}", about or "") from error

    @classmethod
    def merged(cls, recipe: Recipe | None, options: dict[str, Any]) -> Recipe:
        """A recipe with some of its options replaced, which says how small the model should get.

        Raises:
            RecipeError: see `make` and `need_budget`.
        """
        fields = {name: getattr(recipe, name) for name in recipe.model_fields_set} if recipe else {}
        made = cls.make({**fields, **options})
        made.need_budget()
        return made

    @classmethod
    def preset(cls, name: str) -> dict[str, Any]:
        """The options of a shipped recipe.

        Raises:
            RecipeError: there is none of that name.
        """
        known = {path.name.removesuffix(".yaml"): path for path in PRESETS.glob("*.yaml")}
        if name not in known:
            raise RecipeError(f"there is no preset '{name}'.", nearest(name, known))
        return cls.read(known[name])

    @classmethod
    def read(cls, path: str | Path) -> dict[str, Any]:
        """The options in a YAML file, their names checked.

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
        return options


@cache
def _balanced_options() -> dict[str, Any]:
    options: dict[str, Any] = yaml.safe_load((PRESETS / "balanced.yaml").read_text(encoding="utf-8"))
    return options


def _filled(data: Mapping[str, Any]) -> dict[str, Any]:
    """`data`, and options of the preset `balanced` but for those that something in `data` settles."""
    settled = set()
    if data.get("plan") is not None:
        settled |= {"allocation", "allocation_options", "factor_form"}
    if data.get("secondary") is not None:
        settled |= {"factor_form"}
    settled |= {f"{name}_options" for name in ("refine", "allocation") if name in data}
    filled = {name: value for name, value in _balanced_options().items() if name not in settled} | dict(data)
    nested = {"method_options", "refine_options", "allocation_options"}
    for name in nested & _balanced_options().keys() & data.keys() - settled:
        if isinstance(data[name], Mapping):
            filled[name] = {**_balanced_options()[name], **data[name]}
    return filled
