"""One cell of a comparison in a process of its own: `python -m slimrank.comparison.worker`, told what to do on stdin.

So that one cell's end (the kernel may kill it for memory) is not that of the others, and its peak memory is its own.
Progress goes to stdout, a JSON object a line; the result into a file. It ends when stdin does: whoever asked is gone
then, and the same command again will need the run directory.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from slimrank.errors import SlimrankError
from slimrank.evaluate.memory import peak_memory
from slimrank.evaluate.paired import MIN_ITEMS
from slimrank.evaluate.sample import sample
from slimrank.evaluate.speed import measure_speeds
from slimrank.evaluate.suite import Suite, compare, measure
from slimrank.evaluate.tasks import TaskRequest, Tasks
from slimrank.evaluate.windows import windows_of
from slimrank.models.load import load
from slimrank.models.placement import placed, resolve_device
from slimrank.models.storage import saved_bytes
from slimrank.models.structure import parameters_of
from slimrank.pipeline import compress
from slimrank.progress import Progress
from slimrank.recipe import Recipe
from slimrank.report.build import environment
from slimrank.store import write_text
from slimrank.text.overlap import windows_found
from slimrank.text.reading import read_parts, tokens_of
from slimrank.text.rows import Tell
from slimrank.text.sources import read_source
from slimrank.text.texts import found_note, window_length
from slimrank.text.tokens import bos_of
from slimrank.text.windows import tokens_digest

MEMORY_HINT = "keep less in memory: a smaller --seq-len or --samples, --set batch_size=1, or --dtype bfloat16"
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # as allocators put it


def dense_record(asked: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Measure the original on texts and tasks."""
    model, tokenizer = load(asked["model"], asked["dtype"], progress)
    suite = _suite(asked, model, tokenizer, progress)
    device = resolve_device(asked["device"])
    with placed([model], device, upcast=False):
        measured = {**measure(model, tokenizer, suite, progress), **_shown(model, tokenizer, suite)}
    dtype = str(model.dtype).removeprefix("torch.")
    digests = {source: tokens_digest(windows) for source, windows in suite.texts.items()}
    return {**measured, "environment": {**environment(), "device": str(device), "dtype": dtype, "texts": digests}}


def cell_record(asked: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Compress the model by a recipe, measure the result on texts and tasks, and compare it with the original."""
    start = time.perf_counter()
    recipe = Recipe.make(asked["options"])
    result = compress(asked["model"], recipe=recipe, run_dir=asked["run_dir"], progress=progress, keep_statistics=True)
    seconds, peak = time.perf_counter() - start, peak_memory(resolve_device(asked["device"]))
    dense, tokenizer = load(asked["model"], asked["dtype"], progress)
    notes = result.report["notes"]
    suite = _suite(asked, dense, tokenizer, progress, notes.append)
    texts, tasks = replace(suite, tasks=None), replace(suite, texts={})
    with placed([result.model, dense], resolve_device(asked["device"]), upcast=False):
        measured, against = compare(result.model, dense, tokenizer, texts, progress)
        results = measure(result.model, tokenizer, tasks, progress)["tasks"]
        speed, dense_speed = measure_speeds([result.model, dense])
        shown = _shown(result.model, tokenizer, suite)
    return {
        "texts": measured["texts"],
        "against": against["texts"],
        "tasks": results,
        "keep_ratio": result.report["size"]["keep_ratio"],
        "keep_total": result.report["size"]["keep_total"],
        "speed": asdict(speed),
        "speed_ratio": {key: getattr(speed, key) / getattr(dense_speed, key) for key in ("prefill", "decode")},
        "seconds": seconds,
        "stages": result.report["seconds"],
        "peak_memory": peak,
        "notes": [*notes, *_overlaps(result.report, recipe, tokenizer, suite)],
        "inputs": result.report["provenance"]["inputs"],
        **shown,
    }


def _suite(asked: dict[str, Any], model: Any, tokenizer: Any, progress: Progress, tell: Tell = lambda _: None) -> Suite:
    """Read what models are measured on; `tell` is called with what is skipped or changed."""
    length, bos = window_length(model, asked["seq_len"]), bos_of(tokenizer) is not None
    read = {source: read_source(source, "evaluation", tell) for source in asked["texts"]}
    texts = {
        source: windows_of(source, text, model, tokenizer, windows=asked["windows"], seq_len=length, least=MIN_ITEMS)
        for source, text in read.items()
    }
    if asked["tasks"] is None:
        return Suite(texts, bos)
    request = TaskRequest(**{**asked["tasks"], "names": tuple(asked["tasks"]["names"])})
    return Suite(texts, bos, Tasks(request, progress))


def _overlaps(report: dict[str, Any], recipe: Recipe, tokenizer: Any, suite: Suite) -> list[str]:
    """Name the texts whose windows are found in the text that calibrated."""
    if report["provenance"]["inputs"]["calibration"] is None:
        return []
    parts = tokens_of(read_parts(recipe.calibration, "calibration", chat=recipe.chat), tokenizer)
    found = {name: torch.zeros(len(windows), dtype=torch.bool) for name, windows in suite.texts.items()}
    for name, windows in suite.texts.items():
        for tokens in parts:
            found[name] |= windows_found(windows[:, int(suite.bos) :], tokens)
    return [f"{name}: {found_note(some)}" for name, some in found.items() if bool(some.any())]


def _shown(model: Any, tokenizer: Any, suite: Suite) -> dict[str, Any]:
    """Return size of a model, and how it goes on from the beginning of the first text."""
    return {
        "parameters": parameters_of(model),
        "bytes": saved_bytes(model),
        "sample": sample(model, tokenizer, next(iter(suite.texts.values()))[0]),
    }


class _Told(Progress):
    """Passes everything on, a line each."""

    def plan(self, costs: dict[str, float]) -> None:
        self._tell("plan", costs)

    def stage(self, name: str, steps: int) -> None:
        self._tell("stage", name, steps)

    def step(self, done: int = 1) -> None:
        self._tell("step", done)

    def note(self, message: str) -> None:
        self._tell("note", message)

    def _tell(self, *event: Any) -> None:
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()


def _watch_stdin() -> None:
    """End this process at the end of stdin. Files are written whole or not at all: nothing is left in pieces."""

    def watch() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _out_of_memory(error: Exception) -> bool:
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or any(words in str(error) for words in _NO_MEMORY)


def main() -> None:
    """Do what the first line of stdin says, and write the record, or the error, to a file."""
    asked = json.loads(sys.stdin.readline())
    _watch_stdin()
    made: dict[str, Any] = {"request": asked["key"], "error": None}
    try:
        made |= (cell_record if asked["options"] is not None else dense_record)(asked, _Told())
    except SlimrankError as error:
        made["error"] = {"type": type(error).__name__, "message": error.message, "hint": error.hint}
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        made["error"] = {"type": "MemoryError", "message": f"out of memory: {error}", "hint": MEMORY_HINT}
    write_text(Path(asked["result"]), json.dumps(made))


if __name__ == "__main__":
    main()
