"""Files of a comparison: names of those of a cell, and the state of those that a cell depends on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimrank.text.mixtures import parts_of


def slug(name: str) -> str:
    """Return the name of a cell as that of a file."""
    return re.sub(r"[^\w.-]+", "-", name)


def state_of(source: str) -> list[tuple[str, int, int]]:
    """Return names, sizes and times of the files there, by which a change is seen; none for what is not a path."""
    path = Path(source).expanduser()
    try:
        files = sorted(file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
    except OSError:  # a name that no file system allows: that of something else
        return []
    return [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def sources_of(asked: Mapping[str, Any]) -> list[str]:
    """Return whatever may be a file or a folder that a cell depends on."""
    options = asked["options"] or {}
    calibration = names_of(options.get("calibration", "demo"))
    return [*map(str, (asked["model"], *asked["texts"])), *calibration, str(options.get("plan"))]


def names_of(calibration: Any) -> list[str]:
    """Return the names of the parts of a calibration text; a list of texts is not a name of a file."""
    return [str(part.source) for part in parts_of(calibration)]
