"""What is compared: recipes with names, from files or from a grid."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimrank.errors import BudgetError, PlanError, RecipeError
from slimrank.recipe import BUDGETS, Recipe
from slimrank.recipe_values import renamed

_ELSEWHERE = {"device": "--device", "dtype": "--dtype", "evaluation": "--text", "windows": "--windows"}
_OF_THE_GRID = {"method": "--methods", "allocation": "--allocations"}


@dataclass(frozen=True)
class Cell:
    """One recipe of a comparison.

    Attributes:
        name: what it is called in tables; no other cell has the same.
        options: fields of `Recipe`.
    """

    name: str
    options: Mapping[str, Any]

    def recipe(self) -> Recipe:
        """Return the recipe, which measures nothing by itself.

        Raises:
            RecipeError: an unknown option, a value out of range, or no budget; it names the cell.
        """
        with self.named():
            made = Recipe.make({**self.options, "evaluation": None})
            made.need_budget()
        return made

    @contextmanager
    def named(self) -> Iterator[None]:
        """Name the cell in errors of its recipe, but not in those of the model, which all cells share."""
        try:
            yield
        except (RecipeError, BudgetError, PlanError) as error:
            raise type(error)(f"'{self.name}': {error.message}", error.hint) from error


def grid(
    methods: Sequence[str],
    allocations: Sequence[str],
    presets: Sequence[str],
    keep_ratios: Sequence[float],
    shared: Mapping[str, Any],
) -> list[Cell]:
    """Return every method with every allocation, and every preset, at every keep_ratio; `shared` holds for all of them.

    Raises:
        RecipeError: an unknown preset, nothing to keep, allocations without methods, or something shared that the grid
            or `compare` says otherwise.
    """
    if allocations and not methods:
        raise RecipeError(
            "allocations are those of methods, and none is named.", "--methods svd_llm, or no allocations"
        )
    shared = renamed(shared)
    _check_shared(shared, {**_ELSEWHERE, **(_OF_THE_GRID if methods or presets else {})}, keep_ratios)
    if (methods or presets) and not keep_ratios:
        raise RecipeError("methods and presets are compared at some size.", "--keep 0.8,0.6")
    kinds = {f"{m} {a}": {"method": m, "allocation": a} for m in methods for a in allocations or ("uniform",)}
    kinds |= {preset: Recipe.preset(preset) for preset in presets}
    return [
        Cell(f"{name} {keep:g}", {**options, **shared, "keep_ratio": keep})
        for name, options in kinds.items()
        for keep in keep_ratios
    ]


def from_files(paths: Iterable[Path], keep_ratios: Sequence[float], shared: Mapping[str, Any]) -> list[Cell]:
    """Return a cell for each recipe file at its own budget, or at every keep_ratio that is given.

    Raises:
        RecipeError: a file that cannot be read, or something shared that `compare` says otherwise.
    """
    shared = renamed(shared)
    _check_shared(shared, _ELSEWHERE, keep_ratios)
    cells = []
    for path in paths:
        options = {**Recipe.read(path), **shared}
        if not keep_ratios:
            cells.append(Cell(path.stem, options))
        options = {name: value for name, value in options.items() if name not in BUDGETS}
        cells += [Cell(f"{path.stem} {keep:g}", {**options, "keep_ratio": keep}) for keep in keep_ratios]
    return cells


def _check_shared(shared: Mapping[str, Any], elsewhere: Mapping[str, str], keep_ratios: Sequence[float]) -> None:
    """Refuse options that would replace what names a cell, or be replaced silently."""
    instead = {**elsewhere, **(dict.fromkeys(BUDGETS, "--keep") if keep_ratios else {})}
    for name in shared:
        if name in instead:
            raise RecipeError(f"'{name}' cannot be set for all cells like this.", f"say it by {instead[name]}")
