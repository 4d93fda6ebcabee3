"""The shipped recipes, and what the preset `balanced` gives to a recipe without a method."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

PRESETS = Path(__file__).parent / "recipes"


@cache
def balanced_options() -> dict[str, Any]:
    """Return the options of the preset `balanced`."""
    options: dict[str, Any] = yaml.safe_load((PRESETS / "balanced.yaml").read_text(encoding="utf-8"))
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
