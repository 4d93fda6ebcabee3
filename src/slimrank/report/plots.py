"""Plots as SVG strings, out of plain data: ranks by block, spectra, errors by depth. Needs the extra `report`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from math import log10
from typing import Any

from slimrank.report.layer_grid import LayerGrid, SpectrumCurve
from slimrank.report.svg import INK, figure, inline

# Of a luminance that stands out from white and from a dark page alike (contrast of at least 3 to both).
COLOURS = ("#3b82c4", "#c8690a", "#2a9160", "#d9484f", "#8f66cc", "#1a8f9c", "#cc4f93", "#857450")
_MARKERS = "osD^vPX"  # one fewer than colours, so that it takes 56 series until both are the same again
_DENSE, _BELOW_DENSE = "#6f7881", 1 - 1e-6
_LABELLED = 40  # blocks of which a heat map has room for numbers
_FEW_DECADES = 1.5  # over which a logarithmic axis has room for numbers between the powers of ten


def heat_map(grid: LayerGrid, label: str) -> str:
    """Draw the fraction in every cell as a colour, and in percent where there is room; 1 is grey, and --.

    Args:
        grid: kinds of layers by blocks, fractions of 0 to 1.
        label: what is shown, in words.
    """
    labelled = len(grid.blocks) <= _LABELLED
    width = 2.2 + len(grid.blocks) * (0.3 if labelled else 0.12)
    with figure(max(5.0, width), 1.1 + 0.3 * len(grid.kinds)) as drawn:
        axes = drawn.subplots()
        mesh = axes.pcolormesh(
            [_numbers(row) for row in grid.cells], vmin=0, vmax=_BELOW_DENSE, cmap=_colour_map(), edgecolor="none"
        )
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.invert_yaxis()
        axes.set_yticks([i + 0.5 for i in range(len(grid.kinds))], grid.kinds)
        step = max(1, len(grid.blocks) // 20)
        axes.set_xticks([i + 0.5 for i in range(0, len(grid.blocks), step)], grid.blocks[::step])
        axes.tick_params(length=0)
        axes.set_xlabel("block")
        bar = drawn.colorbar(mesh, ax=axes, ticks=[0, 0.5, _BELOW_DENSE], format="{x:.0%}", pad=0.01, aspect=12)
        bar.outline.set_visible(False)
        if labelled:
            _write_numbers(axes, grid, mesh)
        return inline(drawn, label)


def spectrum(title: str, curves: Sequence[SpectrumCurve], label: str) -> str:
    """Draw the relative error left at each rank, a curve for each target, with the rank that was taken marked."""
    with figure(3.3, 2.5, layout=None) as drawn:  # there are many of these, and their margins are known
        drawn.subplots_adjust(left=0.17, right=0.94, bottom=0.2, top=0.88)
        axes = drawn.subplots()
        for curve, colour in zip(curves, cycle(COLOURS), strict=False):
            axes.plot(curve.ranks, curve.errors, color=colour, linewidth=1.5, label=f"block {curve.block}")
            if curve.taken is not None:
                axes.plot(*curve.taken, "o", color=colour, markersize=6)
                axes.vlines(curve.taken[0], 0, curve.taken[1], colors=colour, linewidth=1, linestyles="dotted")
        axes.set(title=title, xlabel="rank", ylabel="relative error", ylim=(0, 1.02), xlim=(0, None))
        axes.title.set_size(10)
        if curves:
            axes.legend(fontsize=8, handlelength=1.2)
        return inline(drawn, label)


def depth(grid: LayerGrid, title: str, top: float, width: float, label: str) -> str:
    """Draw errors against the index of the block, a curve for each kind of layer.

    Args:
        grid: kinds of layers by blocks.
        title: what the errors are of.
        top: the largest error that there is room for, so that two plots can be compared.
        width: inches.
        label: what is shown, in words.
    """
    columns = int(width / 1.5)
    rows = -(-len(grid.kinds) // columns)
    with figure(width, 2.7 + 0.2 * rows) as drawn:
        axes = drawn.subplots()
        for kind, cells, colour, marker in zip(grid.kinds, grid.cells, cycle(COLOURS), cycle(_MARKERS), strict=False):
            if any(cell is not None for cell in cells):
                style = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.2}
                axes.plot(grid.blocks, _numbers(cells), label=kind, **style)
        axes.set(title=title, xlabel="block", ylabel="relative error", ylim=(0, 1.05 * top or 1.0))
        axes.title.set_size(10)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.lines:
            drawn.legend(loc="outside lower center", ncols=columns, fontsize=8, handlelength=1.5)
        return inline(drawn, label)


def sizes(points: Mapping[str, tuple[float, float]], frontier: Sequence[str], dense: float, label: str) -> str:
    """Draw perplexity against size, a colour for each series of cells that differ only in size; dot the frontier.

    Args:
        points: name of a cell -> (fraction of the bytes that is kept, perplexity).
        frontier: names of those that no smaller one is better than, smallest first.
        dense: perplexity of the original.
        label: what is shown, in words.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for name, point in points.items():
        series.setdefault(_without_size(name), []).append(point)
    with figure(9.6, 4.2) as drawn:
        axes = drawn.subplots()
        axes.plot(*zip(*(points[name] for name in frontier), strict=True), ":", color=INK, linewidth=1)
        for (name, cells), colour, marker in zip(series.items(), cycle(COLOURS), cycle(_MARKERS), strict=False):
            axes.plot(*zip(*sorted(cells), strict=True), "-", color=colour, marker=marker, linewidth=1.2, label=name)
        axes.axhline(dense, color=INK, linewidth=1, label="original")
        axes.set(xlabel="part of the bytes that is kept", ylabel="perplexity", yscale="log")
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.yaxis.set_major_formatter("{x:g}")
        bottom, top = axes.get_ylim()
        axes.yaxis.set_minor_formatter("{x:g}" if log10(top / bottom) < _FEW_DECADES else "")
        drawn.legend(loc="outside right upper", fontsize=9)
        return inline(drawn, label)


def _without_size(name: str) -> str:
    return re.sub(r" ([\d.]+( MB)?|int\d\S*)$", "", name)


def _numbers(cells: Sequence[float | None]) -> list[float]:
    return [float("nan") if cell is None else cell for cell in cells]


def _colour_map() -> Any:
    import matplotlib

    return matplotlib.colormaps["viridis"].resampled(20).with_extremes(over=_DENSE)


def _write_numbers(axes: Any, grid: LayerGrid, mesh: Any) -> None:
    for row, cells in enumerate(grid.cells):
        for column, cell in enumerate(cells):
            if cell is not None:
                red, green, blue, _ = mesh.cmap(mesh.norm(cell))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
                shown = "--" if cell == 1 else f"{100 * cell:.0f}"
                place = {"ha": "center", "va": "center_baseline", "fontsize": 8}
                axes.text(column + 0.5, row + 0.5, shown, color="white" if dark else "black", **place)
