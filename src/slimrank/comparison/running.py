"""Run the cells of a comparison one after the other, each in a process of its own, on shared statistics and spectra."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slimrank import __version__
from slimrank.comparison.cells import Cell
from slimrank.errors import RecipeError
from slimrank.evaluate.paired import check_windows, compare_tasks, too_few
from slimrank.evaluate.tasks import Metric, TaskRequest, TaskResult, Tasks
from slimrank.models.load import resolve
from slimrank.pipeline.prepare import Choices
from slimrank.pipeline.preview import preview
from slimrank.progress import Progress
from slimrank.recipe import Recipe
from slimrank.report.comparison import write_comparison
from slimrank.store import content_key, disk_error, locked
from slimrank.text.sources import read_source

RECORD = 2  # what records of cells hold: older ones are made anew
LAYERS = ("dtype", "targets", "ignore", "split")
WINDOWS = ("calibration", "samples", "seq_len", "seed")
WORKER = (sys.executable, "-m", "slimrank.comparison.worker")


def compare(
    model: str | Path,
    cells: Sequence[Cell],
    out: str | Path,
    *,
    texts: Sequence[str] = ("demo",),
    windows: int | None = 16,
    seq_len: int | None = None,
    tasks: TaskRequest | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compress a model by each recipe and measure what comes of it, on the same texts and tasks.

    Statistics and spectra are kept in `OUT/run` and shared by all cells that need the same ones: the text is read once
    for each kind of statistics, whatever the number of cells. Cells that are done are not done again; a cell that
    fails is in the record with its error, and the others go on.

    Args:
        model: hub id, local folder, GGUF file, or "demo".
        cells: what to compare.
        out: folder for comparison.json, comparison.md, comparison.html, `cells/` and `run/`.
        texts: sources to measure perplexity and agreement on.
        windows: first windows of each text; None takes all.
        seq_len: tokens per window; None takes 512 or the model's context.
        tasks: what to ask besides.
        device: where to measure and compress.
        dtype: dtype to load the model in.
        progress: told what happens.

    Returns:
        The record: "model", "texts", "dense" (what the original makes of texts and tasks), "too_few" (metrics of tasks
        that cells are not compared by, see `evaluate.paired`), "cells" (by name; see `worker.cell_record`, or "error")
        and "pareto" (names of the cells that none of fewer parameters is better than, by the perplexity of the first
        text).

    Raises:
        RecipeError: no cell, two of the same name, or a recipe that cannot work, before anything is computed.
        DataError: fewer than two windows, or a text, a calibration source or a task that cannot be read, likewise.
        RunError: another process compares into the same folder.
        OutputError: the folder cannot be made.
        SlimrankError: the model cannot be read.
    """
    progress = progress or Progress()
    check_windows(windows)
    _check(model, cells, device, dtype)
    _check_sources(cells, texts, tasks)
    try:
        folder = Path(out).expanduser()
        (folder / "cells").mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # the latter for an unknown user (~name)
        raise disk_error(error, Path(out)) from error
    common = {
        "model": resolve(model, progress), "texts": list(texts), "windows": windows, "seq_len": seq_len,
        "device": device, "dtype": dtype, "tasks": None if tasks is None else _plain(tasks), "record": RECORD,
    }  # fmt: skip
    dense, made = _all(cells, common, folder, progress)
    record = {
        "slimrank": __version__, "model": str(model), "texts": list(texts), "windows": windows, "seq_len": seq_len,
        "tasks": common["tasks"], "too_few": too_few(_answers(dense)), "dense": dense, "cells": made,
        "pareto": pareto(made, texts[0]),
    }  # fmt: skip
    write_comparison(record, folder)
    return record


def _all(
    cells: Sequence[Cell], common: Mapping[str, Any], folder: Path, progress: Progress
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The record of the original and those of the cells by name, with no other comparison at work in the folder."""
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


def _dense(common: Mapping[str, Any], folder: Path, progress: Progress) -> dict[str, Any]:
    """The record of the original; tells which of its answers no cell's can be compared with."""
    dense = _run("dense", {**common, "options": None}, folder, progress)
    if dense["error"] is not None:
        raise RecipeError(f"the original cannot be measured: {dense['error']['message']}", dense["error"]["hint"])
    for task, metrics in too_few(_answers(dense)).items():
        progress.note(f"{task} has fewer than two questions: no interval of a difference of {', '.join(metrics)}")
    return dense


def _cell(
    cell: Cell, common: Mapping[str, Any], dense: Mapping[str, Any], folder: Path, progress: Progress
) -> dict[str, Any]:
    """The record of a cell, with its recipe, and with what its answers to tasks differ by from the original's."""
    options = {**cell.options, "device": common["device"], "dtype": common["dtype"]}
    record = _run(cell.name, {**common, "options": {**options, "evaluation": None}}, folder, progress)
    if record["error"] is None:
        record["task_differences"] = compare_tasks(_answers(record), _answers(dense))
    else:
        progress.note(f"{cell.name} failed: {record['error']['message']}")
    return {**record, "options": options}


def pareto(cells: Mapping[str, Mapping[str, Any]], text: str) -> list[str]:
    """Cells that no other with as few parameters is better than, fewest parameters first."""
    points = sorted(
        (cell["parameters"], cell["texts"][text]["perplexity"], name)
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


def _check(model: str | Path, cells: Sequence[Cell], device: str, dtype: str) -> None:
    """Everything that can be told without weights: names, options, budgets."""
    if not cells:
        raise RecipeError("there is nothing to compare.", "--methods svd_llm,kfac_svd --keep 0.8, or recipe files")
    twice = [name for name, count in Counter(_slug(cell.name) for cell in cells).items() if count > 1]
    if twice:
        raise RecipeError(f"two cells are called '{twice[0]}'.", "name the files otherwise, or leave one out")
    for cell in cells:
        recipe = cell.recipe().model_copy(update={"device": device, "dtype": dtype})
        with cell.named():
            preview(model, recipe)


def _check_sources(cells: Sequence[Cell], texts: Sequence[str], tasks: TaskRequest | None) -> None:
    """Everything besides the model that can be missing: read here once, before a cell has computed for hours."""
    for source in texts:
        read_source(source, "evaluation")
    recipes = [cell.recipe() for cell in cells]
    for calibration in {recipe.calibration for recipe in recipes if _calibrates(recipe)} - {"self"}:
        read_source(calibration, "calibration")
    if tasks is not None:
        Tasks(tasks)


def _calibrates(recipe: Recipe) -> bool:
    """Tell whether anything that the recipe asks for looks at calibration text."""
    return any(request.source == "calibration" for request in Choices.of(recipe).requests())


def _run(name: str, asked: dict[str, Any], folder: Path, progress: Progress) -> dict[str, Any]:
    """The record of a cell, from its file if that was made for the same."""
    result, log = (folder / "cells" / f"{_slug(name)}{suffix}" for suffix in (".json", ".log"))
    about = [__version__, asked, [_state(source) for source in _sources(asked)]]
    key = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
    if result.is_file():
        known: dict[str, Any] = json.loads(result.read_text())
        if known["request"] == key and known["error"] is None:
            return known
        result.unlink()
    request = {**asked, "key": key, "run_dir": str(_run_folder(asked, folder)), "result": str(result)}
    code = _work(request, log, progress)
    if result.is_file():
        found: dict[str, Any] = json.loads(result.read_text())
        return found
    ended = f"signal {-code} (memory?)" if code < 0 else f"exit code {code}"
    message = f"its process ended with {ended}; its last words: {_last_line(log)}"
    return {"request": key, "error": {"type": "Ended", "message": message, "hint": f"see {log}"}}


def _run_folder(asked: Mapping[str, Any], folder: Path) -> Path:
    """The run directory of cells that the same windows of the same text calibrate, for the same layers."""
    if asked["options"] is None:
        return folder / "run"
    recipe = Recipe.make(asked["options"])
    about = {name: getattr(recipe, name) for name in LAYERS}
    sources = [asked["model"]]
    if Choices.of(recipe).reads_text:
        about |= {name: getattr(recipe, name) for name in WINDOWS}
        sources.append(recipe.calibration)
    files = [_state(str(source)) for source in sources]
    return folder / "run" / content_key({"model": str(asked["model"]), **about, "files": files})


def _sources(asked: Mapping[str, Any]) -> list[str]:
    """Whatever may be a file or a folder that a cell depends on."""
    options = asked["options"] or {}
    return [
        str(source) for source in (asked["model"], *asked["texts"], options.get("calibration"), options.get("plan"))
    ]


def _state(source: str) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files there, by which a change is seen; none for what is no path."""
    path = Path(source).expanduser()
    try:
        files = sorted(file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
    except OSError:  # a name that no file system allows: that of something else
        return []
    return [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _work(request: dict[str, Any], log: Path, progress: Progress) -> int:
    """Have a process do it; its exit code."""
    with (
        log.open("w") as errors,
        subprocess.Popen(WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with suppress(BrokenPipeError):  # it has ended before it read anything; its exit code says how
                process.stdin.write(json.dumps(request, default=str) + "\n")
                process.stdin.flush()  # and it stays open: by its end the process learns that there is nobody any more
            for line in process.stdout:
                if line.startswith("["):
                    event, *arguments = json.loads(line)
                    getattr(progress, event)(*arguments)
        except BaseException:
            process.terminate()
            raise
        return process.wait()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "none"


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def _plain(tasks: TaskRequest) -> dict[str, Any]:
    return {**asdict(tasks), "folder": None if tasks.folder is None else str(tasks.folder)}


def _answers(record: Mapping[str, Any]) -> dict[str, TaskResult]:
    """Tasks as they come out of a file."""
    return {
        task: TaskResult(
            **{
                **result,
                "metrics": {name: Metric(**metric) for name, metric in result["metrics"].items()},
                "questions": {name: tuple(values) for name, values in result["questions"].items()},
            }
        )
        for task, result in record["tasks"].items()
    }
