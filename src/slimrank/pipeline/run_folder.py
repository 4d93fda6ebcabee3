"""Where a run stores finished parts, and what happens to that folder at the end."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slimrank.checkpoint.output_folder import OutputFolder
from slimrank.store import remove_run, usable_folder


def place_of_run(output: OutputFolder | None, run_dir: str | Path | None) -> Path | None:
    """Return the named run directory, or None if there is none; refuse one that cannot be used."""
    if run_dir is not None:
        return usable_folder(run_dir, output.path if output else None)
    if output is not None:
        usable_folder(_own_run(output), output.path)
    return None


@contextmanager
def run_folder(output: OutputFolder | None, run_dir: Path | None) -> Iterator[Path]:
    """Yield the run directory. A directory that nobody named is removed if the run finishes."""
    if run_dir is not None:
        yield run_dir
    elif output is None:
        with tempfile.TemporaryDirectory(prefix="slimrank-") as temporary:
            yield Path(temporary)
    else:
        yield _own_run(output)
        remove_run(_own_run(output))


def _own_run(output: OutputFolder) -> Path:
    return output.path.with_name(output.path.name + ".run")
