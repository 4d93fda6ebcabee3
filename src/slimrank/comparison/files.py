"""Files of a comparison: names of those of a cell, and the state of those that a cell depends on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
    return [
        str(source) for source in (asked["model"], *asked["texts"], options.get("calibration"), options.get("plan"))
    ]
