"""Read the notation of mixtures, `a.txt:0.7,b.jsonl:0.3`, and divide windows among the parts of one."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from slimrank.errors import RecipeError
from slimrank.text.files import existing

Source = str | Path | Sequence[str]
SELF = "self"  # the source that the model writes
_WEIGHTED = re.compile(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", re.DOTALL)
_HOW = "write FILE:WEIGHT,FILE:WEIGHT, for example a.txt:0.7,b.jsonl:0.3; without weights all parts have equal shares"


@dataclass(frozen=True)
class Part:
    """One source of a mixture.

    Attributes:
        source: a single source.
        weight: its weight as given; None where no part has one.
    """

    source: Source
    weight: float | None = None


def parts_of(source: Source) -> list[Part]:
    """Return the parts of a mixture; a single one for any other source.

    An existing file or folder of that very name wins: it is a single source. The same holds for names within a
    mixture, whatever their commas and colons may mean. The last number of `hub:ID:CONFIG:SPLIT` is a weight, if there
    are several parts.

    Raises:
        RecipeError: an empty part, a part that occurs twice, a weight that is not positive, or weights for some parts.
    """
    if not isinstance(source, str) or existing(source) is not None:
        return [Part(source)]
    if "," not in source:
        return [Part(source) if source.startswith("hub:") else _part(source, source)]
    parts = [_part(item, source) for item in _items(source)]
    _check(parts, source)
    return parts


def shares(count: int, parts: Sequence[Part]) -> list[int]:
    """Divide a number of windows among parts by largest remainder; of equal remainders, the earlier part's counts more.

    Weights are taken as the decimal fractions that they are written as.
    """
    weights = [Fraction(1 if part.weight is None else str(part.weight)) for part in parts]
    quotas = [count * weight / sum(weights) for weight in weights]
    found = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(parts)), key=lambda i: found[i] - quotas[i])
    for i in by_remainder[: count - sum(found)]:
        found[i] += 1
    return found


def check_shares(count: int, parts: Sequence[Part]) -> None:
    """Make sure that each part has a share in a number of windows.

    Raises:
        RecipeError: a part has none.
    """
    for part, share in zip(parts, shares(count, parts), strict=True):
        if share == 0:
            raise RecipeError(
                f"the part '{part.source}' of the mixture has no share in {count} windows.",
                "ask for more windows, give it more weight, or leave it out",
            )


def interleaved(groups: Sequence[Tensor]) -> Tensor:
    """Join the windows of parts, each part spread evenly, so that the first windows have similar shares."""
    places = [(torch.arange(len(group), dtype=torch.float64) + 0.5) / max(1, len(group)) for group in groups]
    return torch.cat(list(groups))[torch.cat(places).argsort(stable=True)]


def _items(source: str) -> list[str]:
    """Split at commas, except at those in names of files that exist."""
    pieces, items, i = source.split(","), list[str](), 0
    while i < len(pieces):
        whole = (j for j in range(len(pieces), i + 1, -1) if _exists(",".join(pieces[i:j])))
        j = next(whole, i + 1)
        items.append(",".join(pieces[i:j]).strip())
        i = j
    return items


def _exists(item: str) -> bool:
    """Tell whether an item, with or without a weight, names a file or folder."""
    weighted = _WEIGHTED.fullmatch(item.strip())
    return existing(item.strip()) is not None or (weighted is not None and existing(weighted[1]) is not None)


def _part(item: str, source: str) -> Part:
    weighted = None if existing(item) is not None else _WEIGHTED.fullmatch(item)
    if weighted is None:
        return Part(item)
    weight = float(weighted[2])
    if not 0 < weight < math.inf:
        raise RecipeError(f"the weight {weighted[2]} in the mixture '{source}' is not a positive number.", _HOW)
    return Part(weighted[1], weight)


def _check(parts: Sequence[Part], source: str) -> None:
    names = [str(part.source) for part in parts]
    if "" in names:
        raise RecipeError(f"the mixture '{source}' has an empty part.", _HOW)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(f"the mixture '{source}' names '{twice}' twice.", "name it once, with a larger weight")
    if len({part.weight is None for part in parts}) > 1:
        raise RecipeError(f"some parts of the mixture '{source}' have a weight and some have none.", _HOW)
