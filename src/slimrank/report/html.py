"""The report of a run as one HTML file that needs nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from markupsafe import Markup

from slimrank.errors import MissingExtraError
from slimrank.report import layer_grid, plots
from slimrank.report.render import render

PAGE_WIDTH_INCHES = 9.6  # at which a figure is as wide as a column of text


@dataclass(frozen=True)
class Figures:
    """Plots as `<svg>` elements; none where `missing` says what would bring them.

    Attributes:
        ranks: a heat map.
        spectra: one for each kind of layer.
        depth: errors by block, before and after refining where anything was refined.
        missing: why there are none.
    """

    ranks: Markup | None = None
    spectra: list[Markup] = field(default_factory=list)
    depth: list[Markup] = field(default_factory=list)
    missing: str = ""


def html(record: dict[str, Any]) -> str:
    """Return the page; the same record gives the same bytes."""
    return render("report.html.j2", r=record, name=_short(record["model"]["name"]), figures=_figures(record))


def _figures(record: dict[str, Any]) -> Figures:
    try:
        return Figures(_ranks(record), _spectra(record), _depth(record))
    except MissingExtraError as error:
        return Figures(missing=f"{error.message} {error.hint}")


def _ranks(record: dict[str, Any]) -> Markup:
    return Markup(plots.heat_map(layer_grid.kept_fraction(record), "Percent of its parameters that each layer keeps"))


def _spectra(record: dict[str, Any]) -> list[Markup]:
    kinds = layer_grid.spectra(record).items()
    return [Markup(plots.spectrum(kind, curves, f"Relative error by rank of {kind}")) for kind, curves in kinds]


def _depth(record: dict[str, Any]) -> list[Markup]:
    found = layer_grid.errors(record)
    top = max((cell for part in found.values() for row in part.cells for cell in row if cell is not None), default=0.0)
    width = PAGE_WIDTH_INCHES if len(found) == 1 else PAGE_WIDTH_INCHES / 2
    return [
        Markup(plots.depth(part, title, top, width, f"Relative error by block, {title}"))
        for title, part in found.items()
    ]


def _short(name: str) -> str:
    """Return a hub id as it is, and the last part of a path."""
    return PurePath(name).name if name.startswith(("/", ".", "~")) else name
