"""Write the record of a run as report.json, report.md and report.html."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slimrank.report import layer_grid
from slimrank.report.html import html
from slimrank.report.render import render
from slimrank.store import write_text


def write_reports(record: dict[str, Any], folder: Path) -> None:
    """Write all three into a folder."""
    write_text(folder / "report.json", json.dumps(record, indent=1) + "\n")
    write_text(folder / "report.md", markdown(record))
    write_text(folder / "report.html", html(record))


def markdown(record: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    return render("report.md.j2", r=record, layer_grid=layer_grid)
