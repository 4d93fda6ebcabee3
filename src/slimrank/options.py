"""Options of a method: the keyword-only parameters of its function, validated by their annotations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic.fields import FieldInfo

from slimrank.errors import RecipeError, nearest

N = TypeVar("N", bound=str)
M = TypeVar("M", bound=BaseModel)


def options_of(function: Callable[..., Any], settings: Mapping[str, FieldInfo]) -> type[BaseModel]:
    """Make a model from the keyword-only parameters of a function (annotations, ranges, defaults) and some settings.

    Args:
        function: the method.
        settings: fields of other models that are options of the method as well.

    Raises:
        TypeError: one of them has no default or no annotation.
    """
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {name: (field.annotation, field) for name, field in settings.items()}
    own: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        if name not in hints or parameter.default is inspect.Parameter.empty:
            raise TypeError(f"the option '{name}' of {function.__name__} needs an annotation and a default")
        own[name] = (hints[name], parameter.default)
    name = getattr(function, "__name__", "method")
    return create_model(name, __config__=ConfigDict(frozen=True, extra="forbid"), **{**own, **fields})


def known_needs(needs: Iterable[N], known: Mapping[N, Any]) -> frozenset[N]:
    """Return what a method asks for.

    Raises:
        ValueError: some of it is not known.
    """
    asked = frozenset(needs)
    if unknown := asked - known.keys():
        raise ValueError(f"unknown needs {sorted(map(str, unknown))}; there are {sorted(map(str, known))}")
    return asked


def validated(model: type[BaseModel], given: Mapping[str, Any], owner: str) -> BaseModel:
    """Validate the given values.

    Raises:
        RecipeError: an unknown option (the nearest known name is in the hint), or a value out of range.
    """
    for name in given:
        if name not in model.model_fields:
            hint = nearest(name, model.model_fields) if model.model_fields else "it has no options"
            raise RecipeError(f"{owner} has no option '{name}'.", hint)
    try:
        return model.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        about = table(model)[name]
        message = f"{first['msg'].removeprefix('Value error, ')}, got {first['input']!r}"
        hint = f"{name}: {about['range']}; {about['default']} by default"
        raise RecipeError(f"option {name} of {owner}: {message}", hint) from error


def requested(model: type[M], given: Mapping[str, Any], owner: str, usage: str = "") -> M:
    """Make a request of a command from its options.

    Args:
        model: of the request.
        given: its fields.
        owner: what has these options, as the subject of a sentence.
        usage: the hint where options do not go together.

    Raises:
        RecipeError: an unknown option, or a value out of range.
    """
    for name in given:
        if name not in model.model_fields:
            raise RecipeError(f"{owner} has no option '{name}'.", nearest(name, model.model_fields))
    try:
        return model.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:
            raise RecipeError(f"{message}.", usage) from error
        name = str(first["loc"][0])
        hint = model.model_fields[name].description or ""
        raise RecipeError(f"{name}: {message}, got {first['input']!r}", hint) from error


def table(model: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """Describe the options of a method: default, range and description by name."""
    properties = model.model_json_schema()["properties"] if model.model_fields else {}
    return {
        name: {
            "default": field.default,
            "range": _range(properties[name]),
            "description": field.description or "",
        }
        for name, field in model.model_fields.items()
    }


def _range(schema: Mapping[str, Any]) -> str:
    """Describe a range in words, from a JSON schema."""
    if "anyOf" in schema:
        return " or ".join(_range(part) for part in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(map(str, schema.get("enum", [schema.get("const")])))
    bounds = [
        f"{sign} {schema[key]:g}"
        for key, sign in (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
        if key in schema
    ]
    names = {"array": "list", "null": "null (none)"}
    kind = schema.get("type", "")
    return " ".join([names.get(kind, kind), ", ".join(bounds)]).strip()
