"""The record of a comparison as JSON, Markdown and one HTML file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from slimrank.errors import MissingExtraError
from slimrank.report import plots
from slimrank.report.number_format import megabytes, percent, verdict
from slimrank.report.render import render
from slimrank.store import write_text

Record = dict[str, Any]
AT_ITS_SIZE = "dense at its size"
_LAST = ("95 %", "KL", "decode", "seconds")


def write_comparison(record: Record, folder: Path) -> None:
    """Write comparison.json, comparison.md and comparison.html into a folder."""
    rows = table(record)
    write_text(folder / "comparison.json", json.dumps(record, indent=1) + "\n")
    content = {
        "r": record, "headings": rows[0], "lines": rows[1:], "finished": _finished(record),
        "differences": differences(record), "made": provenance(record), "samples": _samples(record),
    }  # fmt: skip
    write_text(folder / "comparison.md", render("comparison.md.j2", **content))
    svg, missing = _plot(record)
    write_text(folder / "comparison.html", render("comparison.html.j2", **content, plot_of_sizes=svg, missing=missing))


def table(record: Record) -> list[list[str]]:
    """Return headings, the original, then every cell that has not failed; `*` marks Pareto-optimal cells."""
    texts, tasks = record["texts"], _task_metrics(record["dense"])
    of = [f", {text}" for text in texts] if len(texts) > 1 else [""]
    headings = ["", "kept", "size", *_only_if(record["baselines"], AT_ITS_SIZE)]
    headings += [f"perplexity, {text} (ratio, 95 %)" for text in texts]
    headings += [*(f"KL{text}" for text in of), *(f"same top token{text}" for text in of)]
    headings += [*(f"{task}, {metric}" for task, metric in tasks), "decode", "prefill", "seconds", "peak memory"]
    dense = record["dense"]
    original = ["original", "", megabytes(dense["bytes"]), *_only_if(record["baselines"], "")]
    original += [*(f"{dense['texts'][t]['perplexity']:.2f}" for t in texts)]
    original += [*[""] * 2 * len(texts), *(_metric(dense, task, metric) for task, metric in tasks), "", "", "", ""]
    return [headings, original, *(_line(name, cell, record, tasks) for name, cell in _finished(record).items())]


def beside(name: str, record: Record) -> str:
    """Return the largest baseline that is no larger than a cell, with its perplexity over the original's."""
    if name in record["baselines"]:
        return ""
    cells, text = _finished(record), record["texts"][0]
    fitting = [n for n in record["baselines"] if n in cells and cells[n]["bytes"] <= cells[name]["bytes"]]
    if not fitting:
        return "none as small"
    best = max(fitting, key=lambda n: cells[n]["bytes"])
    return f"{best.removeprefix('dense ')}: {cells[best]['against'][text]['ratio']:.3f}"


def _only_if(wanted: list[str], *cells: str) -> tuple[str, ...]:
    return cells if wanted else ()


def differences(record: Record) -> list[tuple[str, ...]]:
    """Return differences of tasks from the original: headings, then a row for each cell, task and metric."""
    lines: list[tuple[str, ...]] = [("", "task", "metric", "difference (95 %)", "significant", "lost", "gained")]
    for name, cell in _finished(record).items():
        for task, metrics in cell["task_differences"].items():
            for metric, found in metrics.items():
                interval = f"{found['difference']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"
                counts = [f"{found[count]:,}" if count in found else "" for count in ("lost", "gained")]
                lines.append((name, task, metric, interval, verdict(found["significant"]), *counts))
    return lines


def provenance(record: Record) -> list[tuple[str, str]]:
    """Return the model, versions, machine, and digests of the inputs."""
    made = record["dense"]["environment"]
    inputs = {str(value) for cell in _finished(record).values() for value in [cell["inputs"]["model"]]}
    calibrated = {str(cell["inputs"]["calibration"]) for cell in _finished(record).values()} - {"None"}
    return [
        ("model", record["model"]),
        *(("digest of the model", digest) for digest in sorted(inputs)),
        *((f"digest of the windows of {text}", digest) for text, digest in made["texts"].items()),
        *(("digest of calibration windows", digest) for digest in sorted(calibrated)),
        ("slimrank", made["slimrank"]),
        ("Python", made["python"]),
        *made["versions"].items(),
        ("dtype", made["dtype"]),
        ("device", f"{made['device']}, {made['threads']} threads"),
    ]


def headline(record: Record) -> list[tuple[str, ...]]:
    """Return what fits into a terminal: headings, the original, every cell that has not failed; on the first text."""
    text, sized = record["texts"][0], record["baselines"]
    headings = ("", "kept", *_only_if(sized, "size"), "perplexity", "ratio", *_only_if(sized, AT_ITS_SIZE), *_LAST)
    dense = f"{record['dense']['texts'][text]['perplexity']:.2f}"
    original = ("original", "", *_only_if(sized, megabytes(record["dense"]["bytes"])), dense)
    lines = [headings, original + ("",) * (len(headings) - len(original))]
    for name, cell in _finished(record).items():
        found = cell["against"][text]
        lines.append((
            _starred(name, record),
            percent(cell["keep_ratio"]),
            *_only_if(sized, megabytes(cell["bytes"])),
            f"{cell['texts'][text]['perplexity']:.2f}",
            f"{found['ratio']:.3f}",
            *_only_if(sized, beside(name, record)),
            f"{found['ratio_low']:#.4g}-{found['ratio_high']:#.4g}",
            f"{found['kl']:.4f}",
            f"x {cell['speed_ratio']['decode']:.2f}",
            f"{cell['seconds']:,.0f}",
        ))  # fmt: skip
    return lines


def failures(record: Record) -> list[tuple[str, str, str]]:
    """Return name, message and hint of every cell that failed."""
    errors = {name: cell["error"] for name, cell in record["cells"].items() if cell["error"] is not None}
    return [(name, error["message"], error["hint"]) for name, error in errors.items()]


def _samples(record: Record) -> list[tuple[str, str]]:
    """Return how the original and every cell go on from the same prompt."""
    wrote = {"original": record["dense"], **_finished(record)}
    return [(name, made["sample"]["text"] or "(nothing)") for name, made in wrote.items()]


def _finished(record: Record) -> dict[str, Record]:
    return {name: cell for name, cell in record["cells"].items() if cell["error"] is None}


def _starred(name: str, record: Record) -> str:
    return f"{name} *" if name in record["pareto"] else name


def _line(name: str, cell: Record, record: Record, tasks: list[tuple[str, str]]) -> list[str]:
    against = [cell["against"][text] for text in record["texts"]]
    return [
        _starred(name, record),
        percent(cell["keep_ratio"]),
        megabytes(cell["bytes"]),
        *_only_if(record["baselines"], beside(name, record)),
        *(_perplexity(cell, text) for text in record["texts"]),
        *(f"{found['kl']:.4f}" for found in against),
        *(f"{found['top1']:.1f} %" for found in against),
        *(_metric(cell, task, metric) for task, metric in tasks),
        f"x {cell['speed_ratio']['decode']:.2f}",
        f"x {cell['speed_ratio']['prefill']:.2f}",
        f"{cell['seconds']:,.0f}",
        f"{cell['peak_memory'] / 1e9:.2f} GB",
    ]


def _perplexity(cell: Record, text: str) -> str:
    found = cell["against"][text]
    interval = f"{found['ratio']:.3f}, {found['ratio_low']:.3f} to {found['ratio_high']:.3f}"
    return f"{cell['texts'][text]['perplexity']:.2f} ({interval})"


def _task_metrics(measured: Record) -> list[tuple[str, str]]:
    return [(task, metric) for task, result in measured["tasks"].items() for metric in result["metrics"]]


def _metric(measured: Record, task: str, metric: str) -> str:
    found = measured["tasks"][task]["metrics"][metric]
    return f"{found['value']:.4f}" + ("" if found["stderr"] is None else f" +- {found['stderr']:.4f}")


def _plot(record: Record) -> tuple[Markup | None, str]:
    """Plot perplexity against size, or return why there is no such plot."""
    text, whole = record["texts"][0], record["dense"]["bytes"]
    points = {
        name: (cell["bytes"] / whole, cell["texts"][text]["perplexity"]) for name, cell in _finished(record).items()
    }
    if not points:
        return None, "No cell has come to an end."
    try:
        label = f"Perplexity on {text} against the part of the bytes that is kept"
        return Markup(plots.sizes(points, record["pareto"], record["dense"]["texts"][text]["perplexity"], label)), ""
    except MissingExtraError as error:
        return None, f"{error.message} {error.hint}"
