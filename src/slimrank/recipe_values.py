"""Former names of options, and checks of single values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from slimrank.errors import RecipeError
from slimrank.linalg.scheme import Scheme
from slimrank.registry import load_plugins

FORMER_NAMES = {"factor_form": "form", "secondary": "store_form"}


def renamed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options under their present names.

    Raises:
        RecipeError: an option under both its names.
    """
    both = [(old, new) for old, new in FORMER_NAMES.items() if old in options and new in options]
    if both:
        raise RecipeError(
            f"'{both[0][0]}' is the former name of '{both[0][1]}'; both are given.", f"give only '{both[0][1]}'"
        )
    return {FORMER_NAMES.get(name, name): value for name, value in options.items()}


def split_parts(value: Any) -> Any:
    """Check how a fused layer is split: a number of equal parts, the outputs of each part, or "qkv".

    Raises:
        ValueError: any other value.
    """
    sizes = value if isinstance(value, (list, tuple)) else [value]
    many = len(sizes) > 1 or (isinstance(value, int) and value > 1)
    if value != "qkv" and not (many and all(type(size) is int and size > 0 for size in sizes)):
        raise ValueError("give a number of equal parts (2 or more), the outputs of each part ([64, 32]), or qkv")
    return value


def form_name(value: Any) -> Any:
    """Check the name of a layer form.

    Raises:
        ValueError: there is no such form.
    """
    if value in (None, "pair", "pivot"):
        return value
    from slimrank.layers.base import import_neighbours  # imports torch, which reading other recipes does not need
    from slimrank.layers.layer_form import FORMS

    import_neighbours()
    load_plugins()
    if value not in FORMS:
        raise ValueError(f"there is no such form; known: {', '.join(sorted(FORMS))}")
    return value


def scheme_name(value: Any) -> Any:
    """Check how weights are rounded to integers.

    Raises:
        ValueError: it is not a scheme.
    """
    return value if value is None else str(Scheme.parse(str(value)))


def listed(value: Any) -> Any:
    """Return what is listed: texts are split at commas."""
    each = [value] if isinstance(value, (str, int)) else value
    return tuple(part for item in each for part in (item.split(",") if isinstance(item, str) else [item]))


def form_list(value: Any) -> Any:
    """Return names of forms whose weights can be quantised, each once.

    Raises:
        ValueError: there is no such form.
    """
    found = sorted({str(name).strip() for name in listed(value)})
    unknown = sorted(set(found) - {"dense", "pair", "pivot", "residual"})
    if unknown:
        from slimrank.layers.quantized_forms import quantized_bases  # imports torch, which other recipes do not need

        load_plugins()
        for name in set(unknown) - set(known := quantized_bases()):
            raise ValueError(f"'{name}' is not a form that can be quantised; known: {', '.join(sorted(known))}")
    return tuple(found)


def widths(value: Any) -> Any:
    """Return widths of integers, each once and increasing.

    Raises:
        ValueError: weights cannot have one of these numbers of bits.
    """
    found = sorted({int(width) for width in listed(value)})
    for width in found:
        Scheme(width)
    return tuple(found)


def check_patterns(value: Any) -> Any:
    """Check patterns of layer names.

    Raises:
        ValueError: what follows `re:` is not a regular expression.
    """
    for pattern in value:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise ValueError(f"'{pattern}' is not a regular expression: {error}") from error
    return value


def check_rank_bounds(value: dict[str, str | int]) -> dict[str, str | int]:
    """Check bounds of ranks by pattern.

    Raises:
        ValueError: one of them is not a rank, MIN..MAX or dense, or leaves no rank.
    """
    for pattern, limit in value.items():
        if not re.fullmatch(r"dense|\d+|\d*\.\.\d*", str(limit)):
            raise ValueError(f"'{limit}' for '{pattern}' is not a rank, MIN..MAX or dense")
        if re.search(r"(?<!\d)0+(?!\d)", str(limit)):
            raise ValueError(f"'{limit}' for '{pattern}': the smallest rank is 1")
        least, _, most = str(limit).partition("..")
        if least and most and int(least) > int(most):
            raise ValueError(f"'{limit}' for '{pattern}' leaves no rank: MIN is more than MAX")
    return value
