"""Where a run stores finished parts, and what happens to that folder at the end."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slimrank.checkpoint.output_folder import OutputFolder
from slimrank.errors import RunError
from slimrank.processes import by_leader, processes
from slimrank.store import MANIFEST, Run, remove_run, usable_folder


def place_of_run(output: OutputFolder | None, run_dir: str | Path | None) -> Path | None:
    """Return the named run directory, or None if there is none; refuse one that cannot be used."""
    if run_dir is not None:
        return usable_folder(run_dir, output.path if output else None)
    if output is not None:
        usable_folder(_own_run(output), output.path)
    return None


@contextmanager
def opened_run(folder: Path, identity: dict[str, Any]) -> Iterator[Run]:
    """Open a run directory; of several processes, the leader keeps others out of it.

    Raises:
        RunError: it is in use, belongs to a different run, or lies on a disk that another process does not see.
        OutputError: it cannot be made.
    """
    team = processes()
    if team.leader:
        with Run(folder, identity) as run:
            team.wait()
            yield run
            team.wait()
        return
    team.wait()
    if not (folder / MANIFEST).is_file():
        raise RunError(f"process {team.rank} does not see the folder '{folder}'.", "--run-dir on a disk that all see")
    yield Run(folder, identity)
    team.wait()


@contextmanager
def run_folder(output: OutputFolder | None, run_dir: Path | None) -> Iterator[Path]:
    """Yield the run directory. A directory that nobody named is removed if the run finishes."""
    if run_dir is not None:
        yield run_dir
    elif output is None:
        with tempfile.TemporaryDirectory(prefix="slimrank-") as temporary:
            yield processes().share(Path(temporary))
    else:
        yield _own_run(output)
        by_leader(lambda: remove_run(_own_run(output)))


def _own_run(output: OutputFolder) -> Path:
    return output.path.with_name(output.path.name + ".run")
