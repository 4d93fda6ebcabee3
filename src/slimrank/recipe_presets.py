"""The shipped recipes, and what the preset `balanced` gives to a recipe without a method."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from slimrank.errors import RecipeError

PRESETS = Path(__file__).parent / "recipes"


@cache
def balanced_options() -> dict[str, Any]:
    """Return the options of the preset `balanced`."""
    options: dict[str, Any] = yaml.safe_load((PRESETS / "balanced.yaml").read_text(encoding="utf-8"))
    return options


def read_options(path: str | Path) -> dict[str, Any]:
    """Return the options in a YAML file, unchecked.

    Raises:
        RecipeError: no such file, not YAML, or not a mapping; it names the file.
    """
    try:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"recipe '{path}' cannot be read: {error.strerror}.", "give a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe '{path}' is not YAML: {error}", "write one 'option: value' per line") from error
    if not isinstance(options, dict):
        raise RecipeError(f"recipe '{path}' holds no options.", "write one 'option: value' per line")
    return options


def with_balanced(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given options and those of the preset `balanced` that none of them settles."""
    settled = set()
    if given.get("plan") is not None:
        settled |= {"allocation", "allocation_options", "form"}
    if given.get("store_form") is not None:
        settled |= {"form"}
    settled |= {f"{name}_options" for name in ("refine", "allocation") if name in given}
    filled = {name: value for name, value in balanced_options().items() if name not in settled} | dict(given)
    nested = {"method_options", "refine_options", "allocation_options"}
    for name in nested & balanced_options().keys() & given.keys() - settled:
        if isinstance(given[name], Mapping):
            filled[name] = {**balanced_options()[name], **given[name]}
    return filled
