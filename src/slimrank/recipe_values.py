"""Checks of single values of a recipe."""

from __future__ import annotations

import re
from typing import Any


def split_parts(value: Any) -> Any:
    """Check what a fused layer is split into: a number of equal parts, the outputs of each part, or "qkv".

    Raises:
        ValueError: it is none of these.
    """
    sizes = value if isinstance(value, (list, tuple)) else [value]
    many = len(sizes) > 1 or (isinstance(value, int) and value > 1)
    if value != "qkv" and not (many and all(type(size) is int and size > 0 for size in sizes)):
        raise ValueError("neither so many equal parts (2 or more), nor the outputs of each ([64, 32]), nor qkv")
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
    if value not in FORMS:
        raise ValueError(f"there is no such form; there are {', '.join(sorted(FORMS))}")
    return value


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
            raise ValueError(f"'{limit}' for '{pattern}' is neither a rank, nor MIN..MAX, nor dense")
        if re.search(r"(?<!\d)0+(?!\d)", str(limit)):
            raise ValueError(f"'{limit}' for '{pattern}': the smallest rank is 1")
        least, _, most = str(limit).partition("..")
        if least and most and int(least) > int(most):
            raise ValueError(f"'{limit}' for '{pattern}' leaves no rank: MIN is more than MAX")
    return value
