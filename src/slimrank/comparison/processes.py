"""Run one cell in a process of its own, unless its record is there already."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from slimrank._version import __version__
from slimrank.comparison.checks import run_folder
from slimrank.comparison.files import slug, sources_of, state_of
from slimrank.progress import Progress

WORKER = (sys.executable, "-m", "slimrank.comparison.worker")


def run_cell(name: str, asked: Mapping[str, Any], folder: Path, progress: Progress) -> dict[str, Any]:
    """Return the record of a cell, from its file if that was made for the same request.

    Args:
        name: of the cell.
        asked: the model, the recipe's options (None for the original), and how to measure.
        folder: of the comparison.
        progress: told what the process tells.
    """
    result, log = (folder / "cells" / f"{slug(name)}{suffix}" for suffix in (".json", ".log"))
    key = _key(asked)
    if result.is_file():
        known = _read(result)
        if known["request"] == key and known["error"] is None:
            return known
        result.unlink()
    request = {**asked, "key": key, "run_dir": str(run_folder(asked, folder)), "result": str(result)}
    code = _work(request, log, progress)
    return _read(result) if result.is_file() else {"request": key, "error": _ended(code, log)}


def _key(asked: Mapping[str, Any]) -> str:
    about = [__version__, asked, [state_of(source) for source in sources_of(asked)]]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


def _read(file: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(file.read_text())
    return record


def _work(request: Mapping[str, Any], log: Path, progress: Progress) -> int:
    """Let a process do it, and return its exit code."""
    with (
        log.open("w") as errors,
        subprocess.Popen(WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        try:
            _send(request, process)
            _follow(process, progress)
        except BaseException:
            process.terminate()
            raise
        return process.wait()


def _send(request: Mapping[str, Any], process: subprocess.Popen[str]) -> None:
    """Write the request; stdin stays open, since by its end the process learns that nobody waits any more."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has ended before it read anything; its exit code says how
        process.stdin.write(json.dumps(request, default=str) + "\n")
        process.stdin.flush()


def _follow(process: subprocess.Popen[str], progress: Progress) -> None:
    """Pass on what the process tells, until it ends."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("["):
            event, *arguments = json.loads(line)
            getattr(progress, event)(*arguments)


def _ended(code: int, log: Path) -> dict[str, str]:
    """Return the error of a process that ended without a record."""
    ended = f"signal {-code} (memory?)" if code < 0 else f"exit code {code}"
    message = f"its process ended with {ended}; its last words: {_last_line(log)}"
    return {"type": "Ended", "message": message, "hint": f"see {log}"}


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "none"
