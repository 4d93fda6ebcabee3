"""The registry of allocators. An allocator is one function with this decorator, in its own file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from slimrank.allocate.plan import Shapes
from slimrank.errors import RecipeError, nearest
from slimrank.linalg.cost import Rank

Allocate = Callable[[Shapes, int, int], Mapping[str, Rank]]


@dataclass(frozen=True)
class Allocator:
    """A rank allocator.

    Attributes:
        id: its name in recipes.
        title: one line for people.
        paper: where it comes from.
        allocate: (shapes by path, budget in parameters, rank multiple) -> rank by path.
    """

    id: str
    title: str
    paper: str
    allocate: Allocate


_REGISTRY: dict[str, Allocator] = {}


def allocator(id: str, title: str, paper: str) -> Callable[[Allocate], Allocate]:
    """Register the decorated function as the allocator `id`."""

    def register(allocate: Allocate) -> Allocate:
        _REGISTRY[id] = Allocator(id, title, paper, allocate)
        return allocate

    return register


def allocators() -> dict[str, Allocator]:
    """All allocators by id."""
    import slimrank.allocate as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_REGISTRY.items()))


def get_allocator(id: str) -> Allocator:
    """The allocator of that id.

    Raises:
        RecipeError: there is none; the nearest names are in the hint.
    """
    known = allocators()
    if id not in known:
        raise RecipeError(f"there is no rank allocation '{id}'.", nearest(id, known))
    return known[id]
