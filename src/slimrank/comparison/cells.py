"""What is compared: recipes with names, from files or from a grid."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimrank.errors import BudgetError, PlanError, RecipeError
from slimrank.linalg.scheme import Scheme
from slimrank.recipe import BUDGETS, Recipe
from slimrank.recipe_values import renamed

GROUP = 64  # columns that share a scale, where a baseline is given as a width
_ELSEWHERE = {"device": "--device", "dtype": "--dtype", "evaluation": "--text", "windows": "--windows"}
_OF_ROUNDING = (
    "calibration",
    "chat",
    "samples",
    "seq_len",
    "seed",
    "batch_size",
    "targets",
    "ignore",
    "split",
    "resident",
)
_OF_THE_GRID = {"method": "--methods", "allocation": "--allocations"}


@dataclass(frozen=True)
class Cell:
    """One recipe of a comparison.

    Attributes:
        name: what it is called in tables; no other cell has the same.
        options: fields of `Recipe`.
        baseline: it is the original in few bits, which others are compared with.
    """

    name: str
    options: Mapping[str, Any]
    baseline: bool = False

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
    max_bytes: Sequence[int] = (),
) -> list[Cell]:
    """Return every method with every allocation, and every preset, at every size; `shared` holds for all of them.

    Raises:
        RecipeError: an unknown preset, nothing to keep, allocations without methods, or something shared that the grid
            or `compare` says otherwise.
    """
    if allocations and not methods:
        raise RecipeError(
            "allocations are those of methods, and none is named.", "--methods svd_llm, or no allocations"
        )
    shared = renamed(shared)
    sizes = _sizes(keep_ratios, max_bytes)
    _check_shared(shared, {**_ELSEWHERE, **(_OF_THE_GRID if methods or presets else {})}, sizes)
    if (methods or presets) and not sizes:
        raise RecipeError("methods and presets are compared at some size.", "--keep 0.8,0.6, or --max-bytes 110000000")
    kinds = {f"{m} {a}": {"method": m, "allocation": a} for m in methods for a in allocations or ("uniform",)}
    kinds |= {preset: Recipe.preset(preset) for preset in presets}
    return [
        Cell(f"{name} {size}", {**options, **shared, **budget})
        for name, options in kinds.items()
        for size, budget in sizes.items()
    ]


def from_files(
    paths: Iterable[Path], keep_ratios: Sequence[float], shared: Mapping[str, Any], max_bytes: Sequence[int] = ()
) -> list[Cell]:
    """Return a cell for each recipe file at its own budget, or at every size that is given.

    Raises:
        RecipeError: a file that cannot be read, or something shared that `compare` says otherwise.
    """
    shared = renamed(shared)
    sizes = _sizes(keep_ratios, max_bytes)
    _check_shared(shared, _ELSEWHERE, sizes)
    cells = []
    for path in paths:
        options = {**Recipe.read(path), **shared}
        if not sizes:
            cells.append(Cell(path.stem, options))
        options = {name: value for name, value in options.items() if name not in BUDGETS}
        cells += [Cell(f"{path.stem} {size}", {**options, **budget}) for size, budget in sizes.items()]
    return cells


def in_few_bits(schemes: Iterable[str], shared: Mapping[str, Any]) -> list[Cell]:
    """Return a cell for the original in each scheme, rounded on the text that calibrates the others.

    Args:
        schemes: "int6-g64" or a width, which has groups of 64.
        shared: what holds for all cells; what does not concern rounding is left out.

    Raises:
        RecipeError: one of them is not a scheme.
    """
    rounding = {name: value for name, value in renamed(shared).items() if name in _OF_ROUNDING}
    plain = {"method": "svd", "keep_ratio": 1.0, **rounding}
    names = [_scheme(scheme) for scheme in schemes]
    return [Cell(f"dense {name}", {**plain, "quantize": name}, baseline=True) for name in names]


def _scheme(given: str) -> str:
    try:
        return str(Scheme.parse(f"int{given}-g{GROUP}" if given.isdecimal() else given))
    except ValueError as error:
        raise RecipeError(f"baseline '{given}': {error}.", "--baselines 8,6,5,4,3, or int4-g128") from error


def _sizes(keep_ratios: Sequence[float], max_bytes: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Return budgets by their names."""
    found: dict[str, dict[str, Any]] = {f"{keep:g}": {"keep_ratio": keep} for keep in keep_ratios}
    return found | {f"{count / 1e6:g} MB": {"max_bytes": count} for count in max_bytes}


def _check_shared(shared: Mapping[str, Any], elsewhere: Mapping[str, str], sizes: Mapping[str, Any]) -> None:
    """Refuse options that would replace what names a cell, or be replaced silently."""
    instead = {**elsewhere, **(dict.fromkeys(BUDGETS, "--keep") if sizes else {})}
    for name in shared:
        if name in instead:
            raise RecipeError(f"'{name}' cannot be set for all cells like this.", f"say it by {instead[name]}")
