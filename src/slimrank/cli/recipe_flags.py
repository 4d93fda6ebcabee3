"""The flags of a recipe, made of the fields of `Recipe`: names, types, help and defaults."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from slimrank.cli.options import Command, pairs
from slimrank.errors import RecipeError
from slimrank.recipe import BUDGETS, Recipe
from slimrank.recipe_presets import balanced_options
from slimrank.recipe_values import FORMER_NAMES, renamed

_KEYWORD = inspect.Parameter.KEYWORD_ONLY
_SOURCES = {
    "preset": Annotated[
        str | None,
        typer.Option("--preset", help="Options by name: fast, balanced, best or small.", rich_help_panel="How small"),
    ],
    "recipe": Annotated[
        Path | None,
        typer.Option(
            "--recipe", help="A YAML file of options; flags given here win over it.", rich_help_panel="How small"
        ),
    ],
    "no_eval": Annotated[
        bool, typer.Option("--no-eval", help="Measure nothing before and after.", rich_help_panel="Text")
    ],
}


def _is_mapping(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is dict


def _value_type(field: FieldInfo) -> Any:
    """Return the type that a flag has on the command line."""
    if _is_mapping(field) or get_origin(field.annotation) is tuple:
        return list[str] | None
    if field.annotation is bool:
        return bool
    allowed = {field.annotation, *get_args(field.annotation)}
    return next((kind | None for kind in (float, int) if kind in allowed), str | None)


def _declared(name: str, field: FieldInfo) -> dict[str, str]:
    """Return what a field declares of its flag: "flag" (its name), "panel" of the help, and "shape" of a value."""
    extra: Any = field.json_schema_extra
    return {**extra, "flag": extra["flag"] or f"--{name.replace('_', '-')}"}


def _help(name: str, field: FieldInfo) -> str:
    """Return the description of a field, how to write its flag, and its default."""
    text, shape = (field.description or "").replace("[", "\\["), _declared(name, field)["shape"]
    if _value_type(field) == list[str] | None:
        return f"{text} {shape}; repeatable." if shape else f"{text} Repeatable."
    own, preset = field.default, balanced_options().get(name)
    if name == "method" or (preset is None and (own is None or own is False)):
        return text
    shown = own if preset is None else f"{preset}; with --method: {'none' if own is None else own}"
    return f"{text}  \\[default: {shown}]"


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    declared, kind = _declared(name, field), _value_type(field)
    option = typer.Option(declared["flag"], help=_help(name, field), rich_help_panel=declared["panel"])
    return inspect.Parameter(
        name, _KEYWORD, default=False if kind is bool else None, annotation=Annotated[kind, option]
    )


def _former_parameter(old: str) -> inspect.Parameter:
    option = typer.Option(f"--{old.replace('_', '-')}", hidden=True)
    return inspect.Parameter(old, _KEYWORD, default=None, annotation=Annotated[str | None, option])


def parameters(fields: Sequence[str] = ()) -> dict[str, inspect.Parameter]:
    """Return the parameters of a command that stand for fields of a recipe, by name; all fields if none is named."""
    named = fields or list(Recipe.model_fields)
    found = {name: _parameter(name, Recipe.model_fields[name]) for name in named}
    if fields:
        return found
    found |= {old: _former_parameter(old) for old in FORMER_NAMES}
    sources = {
        name: inspect.Parameter(name, _KEYWORD, default=False if name == "no_eval" else None, annotation=annotation)
        for name, annotation in _SOURCES.items()
    }
    places = list(found)
    places[places.index("method") : places.index("method")] = ["preset", "recipe"]
    places.insert(places.index("evaluation") + 1, "no_eval")
    every = {**found, **sources}
    return {name: every[name] for name in places}


def recipe_flags(**flags: Any) -> dict[str, Any]:
    """Return the options of a recipe from flags, by the names of the fields.

    Raises:
        RecipeError: a value that cannot be read, or flags that do not go together.
    """
    given = {name: _read(name, value) for name, value in flags.items() if name not in _SOURCES}
    return recipe_options(flags.get("preset"), flags.get("recipe"), given, flags.get("no_eval", False))


def _read(name: str, value: Any) -> Any:
    """Return the value of a field from that of its flag."""
    field = Recipe.model_fields.get(name)
    if field is None or not _is_mapping(field):
        return value
    return _stages(value) if name == "stages" else pairs(value)


def _stages(given: list[str] | None) -> dict[str, Any] | None:
    """Return stages and their options; a bare name has none."""
    return pairs([text if "=" in text else f"{text}={{}}" for text in given or []])


def with_recipe_flags(command: Command) -> Callable[..., None]:
    """Return a command with the flags that `takes_recipe` named."""
    fields: Sequence[str] = getattr(command, "recipe_fields")  # noqa: B009
    own, shared = inspect.signature(command, eval_str=True), parameters(fields)

    @functools.wraps(command)
    def with_flags(**given: Any) -> None:
        flags = {name: given.pop(name) for name in shared}
        command(chosen=recipe_flags(**flags), **given)

    mine = [p for name, p in own.parameters.items() if name != "chosen"]
    required = [p for p in mine if p.default is p.empty]
    optional = [p for p in mine if p.default is not p.empty]
    every = [p.replace(kind=_KEYWORD) for p in (*required, *shared.values(), *optional)]
    with_flags.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
    with_flags.__annotations__ = {p.name: p.annotation for p in every}
    return with_flags


def recipe_options(
    preset: str | None, recipe_file: Path | None, flags: dict[str, Any], no_eval: bool = False
) -> dict[str, Any]:
    """Return the options of a recipe: those of the preset, then of the file, then the flags that were given.

    Raises:
        RecipeError: a plan and an allocation are both given.
    """
    options = Recipe.preset(preset) if preset is not None else {}
    if recipe_file is not None:
        options = _later(options, Recipe.read(recipe_file), BUDGETS)
    given = {
        name: value
        for name, value in flags.items()
        if value is not None and value is not False and value not in ([], ())
    }
    given = renamed(given)
    if "plan" in given and given.keys() & {"allocation", "allocation_options"}:
        raise RecipeError(
            "a plan fixes the ranks; an allocation cannot be given with it.", "give --plan or --allocation, not both"
        )
    merged = _later(options, given, BUDGETS)
    if no_eval:
        merged["evaluation"] = None
    return merged


def _later(options: dict[str, Any], given: dict[str, Any], budgets: Sequence[str]) -> dict[str, Any]:
    """Update options by those given later: a budget replaces another; options of a method that stays are merged."""
    if any(name in given for name in budgets):
        fixed = {"ranks", "rank_multiple", "bits", "quantize"}
        replaced = {*budgets, *fixed} if "plan" in given else budgets
        options = {name: value for name, value in options.items() if name not in replaced}
    given = dict(given)
    for which, extra in (
        ("method", "method_options"),
        ("refine", "refine_options"),
        ("allocation", "allocation_options"),
    ):
        if given.get(which, options.get(which)) == options.get(which) and extra in options:
            given[extra] = {**options[extra], **given.get(extra, {})}
        elif extra in options:
            given.setdefault(extra, {})
    return {**options, **given}
