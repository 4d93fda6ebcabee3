"""Run the cells of a comparison one after the other, on shared statistics and spectra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from slimrank._version import __version__
from slimrank.comparison.cells import Cell
from slimrank.comparison.checks import check_cells, check_sources
from slimrank.comparison.processes import run_cell
from slimrank.comparison.request import Measurement, MeasureOptions
from slimrank.errors import RecipeError
from slimrank.evaluate.paired import check_windows, compare_tasks, too_few
from slimrank.evaluate.tasks import results_of
from slimrank.models.load import resolve
from slimrank.progress import Progress
from slimrank.report.comparison import write_comparison
from slimrank.store import disk_error, locked

Record = dict[str, Any]


def compare(
    model: str | Path,
    cells: Sequence[Cell],
    out: str | Path,
    *,
    progress: Progress | None = None,
    **measured: Unpack[MeasureOptions],
) -> Record:
    """Compress a model by each recipe and measure the results, on the same texts and tasks.

    Statistics and spectra are stored in `OUT/run` and shared by all cells that need the same ones: the text is read
    once for each kind of statistics, whatever the number of cells. Cells that are done are not done again; a cell that
    fails is in the record with its error, and the others go on.

    Args:
        model: hub id, local folder, GGUF file, or "demo".
        cells: what to compare.
        out: folder for comparison.json, comparison.md, comparison.html, `cells/` and `run/`.
        progress: told what happens.
        measured: `texts`, `windows`, `seq_len`, `tasks`, `device` and `dtype`, see `Measurement`.

    Returns:
        The record: "model", "texts", "dense" (measurements of the original), "too_few" (metrics of tasks that cells
        are not compared by, see `evaluate.paired`), "cells" (by name; see `worker.cell_record`, or "error"),
        "baselines" (names of the cells that are the original in few bits) and "pareto" (names of the Pareto-optimal
        cells, by bytes and the perplexity of the first text).

    Raises:
        RecipeError: no cell, two of the same name, or a recipe that cannot work, before anything is computed.
        DataError: fewer than two windows, or a text, a calibration source or a task that cannot be read, likewise.
        RunError: another process compares into the same folder.
        OutputError: the folder cannot be made.
        SlimrankError: the model cannot be read.
        TypeError: an unknown option.
    """
    progress, how = progress or Progress(), Measurement(**measured)
    check_windows(how.windows)
    check_cells(model, cells, how)
    check_sources(cells, how)
    folder = _folder(out)
    common = {"model": resolve(model, progress), **how.plain()}
    dense, made = _all(cells, common, folder, progress)
    record = {
        "slimrank": __version__, "model": str(model),
        **{name: common[name] for name in ("texts", "windows", "seq_len", "tasks")},
        "too_few": too_few(results_of(dense)), "dense": dense, "cells": made,
        "baselines": [cell.name for cell in cells if cell.baseline], "pareto": pareto(made, how.texts[0]),
    }  # fmt: skip
    write_comparison(record, folder)
    return record


def pareto(cells: Mapping[str, Mapping[str, Any]], text: str) -> list[str]:
    """Return the Pareto-optimal cells, fewest bytes first: none of fewer bytes has a lower perplexity."""
    points = sorted(
        (cell["bytes"], cell["texts"][text]["perplexity"], name)
        for name, cell in cells.items()
        if cell["error"] is None
    )
    found: list[str] = []
    best = float("inf")
    for _, perplexity, name in points:
        if perplexity < best:
            best = perplexity
            found.append(name)
    return found


def _folder(out: str | Path) -> Path:
    """Make the folder of a comparison."""
    try:
        folder = Path(out).expanduser()
        (folder / "cells").mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # the latter for an unknown user (~name)
        raise disk_error(error, Path(out)) from error
    return folder


def _all(
    cells: Sequence[Cell], common: Mapping[str, Any], folder: Path, progress: Progress
) -> tuple[Record, dict[str, Record]]:
    """Return the record of the original and those of the cells by name; no other comparison may use the folder."""
    lock = locked(folder / "cells", "wait for it to end, or take another --out")
    try:
        dense = _dense(common, folder, progress)
        made = {}
        for number, cell in enumerate(cells, 1):
            progress.note(f"{cell.name} ({number} of {len(cells)})")
            made[cell.name] = _cell(cell, common, dense, folder, progress)
        return dense, made
    finally:
        lock.release()


def _dense(common: Mapping[str, Any], folder: Path, progress: Progress) -> Record:
    """Return the record of the original; note the task metrics that no cell can be compared by."""
    dense = run_cell("dense", {**common, "options": None}, folder, progress)
    if dense["error"] is not None:
        raise RecipeError(f"the original cannot be measured: {dense['error']['message']}", dense["error"]["hint"])
    for task, metrics in too_few(results_of(dense)).items():
        progress.note(f"{task} has fewer than two questions: no interval of a difference of {', '.join(metrics)}")
    return dense


def _cell(cell: Cell, common: Mapping[str, Any], dense: Record, folder: Path, progress: Progress) -> Record:
    """Return the record of a cell, with its recipe and how its task results differ from the original's."""
    options = {**cell.options, "device": common["device"], "dtype": common["dtype"]}
    record = run_cell(cell.name, {**common, "options": {**options, "evaluation": None}}, folder, progress)
    if record["error"] is None:
        record["task_differences"] = compare_tasks(results_of(record), results_of(dense))
    else:
        progress.note(f"{cell.name} failed: {record['error']['message']}")
    return {**record, "options": options}
