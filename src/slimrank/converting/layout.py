"""A layout of compressed models: what its configuration says, and how its tensors are named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slimrank.registry import Registry


@dataclass(frozen=True)
class Names:
    """How the parts of a layer of factors are named, after the path of the layer.

    Attributes:
        a: the factor rank x in.
        b: the factor out x rank.
        bias: of the layer.
        empty: parts that hold nothing.
    """

    a: str
    b: str
    bias: str
    empty: tuple[str, ...] = ()


@dataclass(frozen=True)
class Described:
    """What a configuration says.

    Attributes:
        model_type: the native architecture.
        config: its native configuration.
        ranks: path of each compressed layer -> its rank.
        base: hub id of the original, if it is stated.
        facts: anything else that the page is to say, by name.
    """

    model_type: str
    config: Mapping[str, Any]
    ranks: Mapping[str, int]
    base: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


class Layout:
    """A way in which others store compressed models. A subclass sets all of this.

    Attributes:
        id: short name.
        title: what the model was made by, in words.
        names: of a layer's parts.
        prefix: what the names of all tensors begin with.
    """

    id: str
    title: str
    names: Names
    prefix: str = ""

    def fits(self, config: Mapping[str, Any]) -> bool:
        """Tell whether config.json is one of this layout."""
        raise NotImplementedError

    def describe(self, config: Mapping[str, Any]) -> Described:
        """Read config.json.

        Raises:
            KeyError, TypeError, ValueError: it lacks something.
        """
        raise NotImplementedError


LAYOUTS: Registry[Layout] = Registry("slimrank.converting.layouts", "layout")


def ranks_of(table: Any) -> dict[str, int]:
    """Read a table of ranks.

    Raises:
        ValueError: it is none, or holds something other than positive whole numbers.
    """
    if not isinstance(table, Mapping) or not table:
        raise ValueError("its table of ranks is empty")
    wrong = [path for path, rank in table.items() if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1]
    if wrong:
        raise ValueError(f"the rank of '{wrong[0]}' is {table[wrong[0]]!r}")
    return dict(table)
