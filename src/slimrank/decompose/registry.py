"""The registry of decomposers. A method is one function with this decorator, in its own file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from slimrank.linalg.lowrank import Spectrum
from slimrank.registry import Registry

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


DECOMPOSERS: Registry[Decomposer] = Registry("slimrank.decompose", "decomposition method")


def decomposer(id: str, title: str, paper: str, needs: set[Need] | None = None) -> Callable[[Solve], Solve]:
    """Register the decorated function as the decomposer `id`."""

    def register(solve: Solve) -> Solve:
        DECOMPOSERS.add(Decomposer(id, title, paper, frozenset(needs or ()), solve))
        return solve

    return register
