"""The registry of decomposers. A method is one function with this decorator, in its own file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from slimrank.errors import RecipeError, nearest
from slimrank.linalg.lowrank import Spectrum

Need = Literal["gram"]
Solve = Callable[[Tensor, Tensor | None], Spectrum]


@dataclass(frozen=True)
class Decomposer:
    """A decomposition method.

    Attributes:
        id: its name in recipes.
        title: one line for people.
        paper: where it comes from.
        needs: the statistics it asks for.
        solve: (weight m x n, gram n x n or None) -> Spectrum. Pure; any device.
    """

    id: str
    title: str
    paper: str
    needs: frozenset[Need]
    solve: Solve


_REGISTRY: dict[str, Decomposer] = {}


def decomposer(id: str, title: str, paper: str, needs: set[Need] | None = None) -> Callable[[Solve], Solve]:
    """Register the decorated function as the decomposer `id`."""

    def register(solve: Solve) -> Solve:
        _REGISTRY[id] = Decomposer(id, title, paper, frozenset(needs or ()), solve)
        return solve

    return register


def decomposers() -> dict[str, Decomposer]:
    """All decomposers by id, shipped and registered by the user."""
    import slimrank.decompose as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_REGISTRY.items()))


def get_decomposer(id: str) -> Decomposer:
    """The decomposer of that id.

    Raises:
        RecipeError: there is none; the nearest names are in the hint.
    """
    known = decomposers()
    if id not in known:
        raise RecipeError(f"there is no decomposition method '{id}'.", nearest(id, known))
    return known[id]
