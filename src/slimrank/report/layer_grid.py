"""The targets of a record by kind of layer and block: what heat maps, curves and tables are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from slimrank.models.structure import short_names

Row = dict[str, Any]  # of a record's "targets"
MAX_SPECTRUM_KINDS = 8  # kinds of layers whose spectra are shown
Cells = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class LayerGrid:
    """A number for every kind of layer in every block.

    Attributes:
        kinds: short names of the kinds.
        blocks: indices of the blocks.
        cells: kinds x blocks; None where there is no such layer, or no such number.
    """

    kinds: tuple[str, ...]
    blocks: tuple[int, ...]
    cells: Cells


@dataclass(frozen=True)
class SpectrumCurve:
    """The spectrum of one target: the relative error at some ranks, and the rank that was taken.

    Attributes:
        block: its block.
        ranks: increasing.
        errors: relative errors, as many.
        taken: rank and relative error; None where the layer stays dense.
    """

    block: int
    ranks: tuple[int, ...]
    errors: tuple[float, ...]
    taken: tuple[int, float] | None


def kept_fraction(record: Row) -> LayerGrid:
    """Return the fraction of its parameters that each layer keeps; 1 if it stays dense."""
    return _grid(record, lambda rows: _total(rows, "parameters_after") / _total(rows, "parameters_before"))


def errors(record: Row) -> dict[str, LayerGrid]:
    """Return relative errors of factored layers, means over experts; before and after refining if any was refined."""
    if not any("refined" in row for row in record["targets"]):
        return {"after factorising": _grid(record, _cut_error)}
    return {f"{when} refining": _grid(record, _refined(when)) for when in ("before", "after")}


def spectra(record: Row) -> dict[str, list[SpectrumCurve]]:
    """Return spectra of the largest kinds of layers, each in the first, middle and last block that has it."""
    known = record["spectra"]
    kinds = {kind: [row for row in rows if row["path"] in known] for kind, rows in _by_kind(record).items()}
    largest = sorted(kinds, key=lambda kind: -_total(kinds[kind], "parameters_before"))[:MAX_SPECTRUM_KINDS]
    return {kind: [_curve(row, known[row["path"]]) for row in _three(kinds[kind])] for kind in kinds if kind in largest}


def _by_kind(record: Row) -> dict[str, list[Row]]:
    roles: dict[str, list[Row]] = {}
    for row in record["targets"]:
        roles.setdefault(row["role"], []).append(row)
    names = short_names(list(roles))
    return {names[role]: rows for role, rows in roles.items()}


def _grid(record: Row, number: Callable[[list[Row]], float | None]) -> LayerGrid:
    kinds = _by_kind(record)
    blocks = tuple(sorted({row["block"] for row in record["targets"]}))
    cells = tuple(tuple(_cell(rows, block, number) for block in blocks) for rows in kinds.values())
    return LayerGrid(tuple(kinds), blocks, cells)


def _cell(rows: list[Row], block: int, number: Callable[[list[Row]], float | None]) -> float | None:
    mine = [row for row in rows if row["block"] == block]
    return number(mine) if mine else None


def _cut_error(rows: list[Row]) -> float | None:
    return _mean([row["relative_error"] for row in rows if row["rank"] != "dense"])


def _refined(when: str) -> Callable[[list[Row]], float | None]:
    return lambda rows: _mean([row["refined"][when] for row in rows if "refined" in row])


def _mean(numbers: Sequence[float]) -> float | None:
    return sum(numbers) / len(numbers) if numbers else None


def _total(rows: Sequence[Row], field: str) -> int:
    return sum(row[field] for row in rows)


def _three(rows: list[Row]) -> list[Row]:
    first_of_block = list({row["block"]: row for row in reversed(rows)}.values())[::-1]
    places = sorted({0, len(first_of_block) // 2, len(first_of_block) - 1}) if rows else []
    return [first_of_block[place] for place in places]


def _curve(row: Row, spectrum: Row) -> SpectrumCurve:
    taken = None if row["rank"] == "dense" else (row["rank"], row["relative_error"])
    return SpectrumCurve(row["block"], tuple(spectrum["ranks"]), tuple(spectrum["errors"]), taken)
