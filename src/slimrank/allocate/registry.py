"""The registry of allocators. An allocator is one function with this decorator, in its own file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from slimrank.allocate.plan import Shapes
from slimrank.linalg.cost import Rank
from slimrank.registry import Registry

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


ALLOCATORS: Registry[Allocator] = Registry("slimrank.allocate", "rank allocation")


def allocator(id: str, title: str, paper: str) -> Callable[[Allocate], Allocate]:
    """Register the decorated function as the allocator `id`."""

    def register(allocate: Allocate) -> Allocate:
        ALLOCATORS.add(Allocator(id, title, paper, allocate))
        return allocate

    return register
