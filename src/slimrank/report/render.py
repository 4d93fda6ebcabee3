"""Render the record of a run as report.json and report.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from slimrank.run import write_text

_MEASURED = (
    ("perplexity", "perplexity", "perplexity", "{:.2f}"),
    ("prefill, tokens/s", "speed", "prefill", "{:.0f}"),
    ("decode, tokens/s", "speed", "decode", "{:.1f}"),
)


def write_reports(record: dict[str, Any], folder: Path) -> None:
    """Write report.json and report.md into a folder."""
    write_text(folder / "report.json", json.dumps(record, indent=1) + "\n")
    write_text(folder / "report.md", markdown(record))


def markdown(record: dict[str, Any]) -> str:
    """The report as Markdown."""
    environment = Environment(
        loader=PackageLoader("slimrank.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"millions": millions, "megabytes": megabytes, "percent": percent, "code": code}
    refined = any("refined" in target for target in record["targets"])
    return environment.get_template("report.md.j2").render(
        r=record, rows=comparison(record), refined=refined, refined_cells=_refined_cells
    )


def _refined_cells(target: dict[str, Any]) -> str:
    errors = target.get("refined")
    return f" {errors['before']:.4f} | {errors['after']:.4f} |" if errors else " | |"


def comparison(record: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The table before / after: label, before, after, ratio."""
    size, before, after = record["size"], record["before"], record["after"]
    rows = [
        _row("parameters of the linears", size["linears_before"], size["linears_after"], millions),
        _row("parameters of the model", size["parameters_before"], size["parameters_after"], millions),
        _row("size on disk", size["bytes_before"], size["bytes_after"], megabytes),
    ]
    if before:
        for label, part, key, shown in _MEASURED:
            rows.append(_row(label, before[part][key], after[part][key], shown.format))
    return rows


def _row(label: str, before: float, after: float, shown: Any) -> tuple[str, str, str, str]:
    return label, shown(before), shown(after), f"x {after / before:.3f}"


def millions(count: int) -> str:
    """134.5 M, or 35.1 k where it is less than a million."""
    return f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count / 1e3:,.1f} k"


def megabytes(count: int) -> str:
    """538.1 MB (decimal)."""
    return f"{count / 1e6:,.1f} MB"


def percent(fraction: float) -> str:
    """80.0 %."""
    return f"{100 * fraction:.1f} %"


def code(text: str) -> str:
    """Text as a Markdown block that nothing in it can break."""
    return "\n".join("    " + line for line in text.splitlines()) or "    (nothing)"
