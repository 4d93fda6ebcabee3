"""What reports say of a record: rows of tables and sentences, the same in HTML, Markdown and the terminal."""

from __future__ import annotations

from typing import Any

import numpy as np

from slimrank.report import layer_grid
from slimrank.report.kv_table import KV_NOTE as KV_NOTE  # templates show it
from slimrank.report.kv_table import kv_headings, kv_rows
from slimrank.report.layer_grid import LayerGrid
from slimrank.report.number_format import megabytes, millions, percent

Record = dict[str, Any]
KNOWN_SIDE = ("perplexity", "sample", "peak_memory")  # what is measured before and after, besides metrics from outside


def comparison(record: Record) -> list[tuple[str, str, str, str]]:
    """Return the table before / after: label, before, after, ratio."""
    size, before, after = record["size"], record["before"], record["after"]
    rows = [
        _row("parameters of the linears", size["linears_before"], size["linears_after"], millions),
        _row("parameters of the model", size["parameters_before"], size["parameters_after"], millions),
        _row("size on disk", size["bytes_before"], size["bytes_after"], megabytes),
    ]
    if before:
        found, now = (side["perplexity"]["perplexity"] for side in (before, after))
        rows.append(_row("perplexity", found, now, "{:.2f}".format))
    return rows + [_metric(before[name], after[name]) for name in before if name in after and name not in KNOWN_SIDE]


def caches(record: Record) -> tuple[tuple[str, ...], list[tuple[str, ...]]] | None:
    """Return headings and rows of what caches of keys and values take; None where that is not known."""
    found = record.get("kv_bytes")
    return (kv_headings(found), kv_rows(found)) if found else None


def _row(label: str, before: float, after: float, shown: Any) -> tuple[str, str, str, str]:
    return label, shown(before), shown(after), f"x {after / before:.3f}" if before else ""


def _metric(before: Record, after: Record) -> tuple[str, str, str, str]:
    """Show a metric from outside slimrank as its record describes it."""
    label = f"{before['title']} ({before['better']} is better)"
    return _row(label, before["value"], after["value"], lambda value: f"{value:,.4g} {before['unit']}".strip())


def made_by(record: Record) -> str:
    """State in one line the method, the allocation, what comes after, and how factors are stored."""
    recipe, rounds = record["provenance"]["recipe"], [c for c in record["corrections"] if c["kept"]]
    parts = [f"method {recipe['method']}", f"ranks by {record['allocation']['id']}"]
    if recipe["refine"]:
        parts.append(f"refined by {recipe['refine']}")
    if recipe["quantize"]:
        parts.append(f"rounded to {recipe['quantize']}")
    if rounds:
        parts.append(f"corrected {len(rounds)} times" if len(rounds) > 1 else "corrected once")
    return ", ".join([*parts, f"stored as {_stored_as(record['size']['stored_as'])}"])


def _stored_as(form: str) -> str:
    """Name a form of layers for people."""
    return {"pair": "two factors", "pivot": "pivot layers"}.get(form, f"'{form}' layers")


def perplexity(record: Record) -> str:
    """State what the perplexity was measured on, up to the name of the text."""
    p = record["before"]["perplexity"]
    return (
        f"{p['windows']} windows of {p['seq_len']} tokens, no overlap, {'with' if p['bos'] else 'without'} BOS, "
        f"{p['tokens']:,} predictions"
    )


def coverage(record: Record) -> list[tuple[str, str, str]]:
    """Return what is compressed, and what is not for which reason: label, parameters, share of the model."""
    found = record["coverage"]
    counts = [("compressed", found["targets"])] + [(f"not: {reason}", n) for reason, n in found["left_out"].items()]
    return [(label, millions(count), percent(count / found["total"])) for label, count in counts]


def corrections(record: Record) -> list[tuple[str, ...]]:
    """Return rounds: number, divergence on its windows, on held-out windows before and after, and the outcome."""
    return [
        (str(number), *(f"{c[key]:.4f}" for key in ("here", "before", "after")), "kept" if c["kept"] else "undone")
        for number, c in enumerate(record["corrections"], 1)
    ]


def refined(record: Record) -> bool:
    """Tell whether any layer was refined."""
    return any("refined" in target for target in record["targets"])


def layers(record: Record) -> list[tuple[str, ...]]:
    """Return every target: path, shape, rank, kept, relative error; before and after refining if any was refined."""
    more = refined(record)
    return [
        (
            t["path"],
            "{} x {}".format(*t["shape"]),
            str(t["rank"]),
            percent(t["parameters_after"] / t["parameters_before"]),
            f"{t['relative_error']:.4f}",
            *((f"{t['refined'][when]:.4f}" if "refined" in t else "" for when in ("before", "after")) if more else ()),
        )
        for t in record["targets"]
    ]


def by_block(found: LayerGrid, shown: str) -> list[tuple[str, ...]]:
    """Return a grid, a row for each block, its numbers formatted by `shown`."""
    columns = zip(*found.cells, strict=True)
    return [
        (str(block), *("" if cell is None else shown.format(cell) for cell in cells))
        for block, cells in zip(found.blocks, columns, strict=True)
    ]


def spectra(record: Record) -> list[tuple[str, ...]]:
    """Return of some targets: kind, block, error at 1/8, 1/4 and 1/2 of all ranks, rank taken, its error."""
    return [
        (
            kind,
            str(curve.block),
            *(f"{np.interp(part * curve.ranks[-1], curve.ranks, curve.errors):.2f}" for part in (1 / 8, 1 / 4, 1 / 2)),
            *(("dense", "") if curve.taken is None else (str(curve.taken[0]), f"{curve.taken[1]:.4f}")),
        )
        for kind, curves in layer_grid.spectra(record).items()
        for curve in curves
    ]


def seconds(record: Record) -> list[tuple[str, str]]:
    """Return stages and the seconds that they took."""
    return [(name, f"{taken:.1f}") for name, taken in record["seconds"].items()]


def recipe(record: Record) -> list[tuple[str, str]]:
    """Return options and their values; a plan that was given as such is in plan.json."""
    return [(key, _option(key, value)) for key, value in record["provenance"]["recipe"].items()]


def _option(key: str, value: Any) -> str:
    if key == "plan" and isinstance(value, dict):
        return "see plan.json"
    return str(value)


def provenance(record: Record) -> list[tuple[str, str]]:
    """Return the model, versions, machine, and digests of inputs."""
    made, model = record["provenance"], record["model"]
    return [
        ("model", model["name"]),
        ("on the hub", model["hub_id"] or "not known"),
        ("slimrank", made["slimrank"]),
        ("Python", made["python"]),
        *made["versions"].items(),
        ("method", str(made["method"])),
        *((f"input: {name}", str(value)) for name, value in made["inputs"].items()),
        ("dtype", made["dtype"]),
        ("device", f"{made['device']}, {made['threads']} threads"),
    ]
