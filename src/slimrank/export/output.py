"""The output folder: all or nothing, and never a file of someone else's deleted."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slimrank.errors import OutputError
from slimrank.run import disk_error, write_text

MANIFEST = "slimrank.json"
REPORTS = ("report.json", "report.md", "report.html")
CARD = "README.md"
_MARK = ".slimrank-partial"


class OutputFolder:
    """Where a compressed model is written.

    Args:
        path: the folder to make.
        overwrite: replace what slimrank wrote there before; other files stay.

    Raises:
        OutputError: the folder exists and may not be replaced.
    """

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        path = path.expanduser().resolve()
        if not path.name:
            raise OutputError(f"'{path}' is no place for a model.", "give a folder that does not exist yet")
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        self._old = path.with_name(path.name + ".old")
        if path.is_file():
            raise OutputError(f"'{path}' is a file.", "give a folder that does not exist yet")
        if path.is_dir() and any(path.iterdir()):
            if not overwrite:
                raise OutputError(f"the output folder '{path}' exists.", "--overwrite, or another --out")
            if not (path / MANIFEST).is_file():
                raise OutputError(
                    f"'{path}' was not written by slimrank (it has no {MANIFEST}), so it is not overwritten.",
                    "choose another --out",
                )
        if self._partial.exists() and not (self._partial / _MARK).is_file():
            raise OutputError(f"'{self._partial}' is in the way.", "move it elsewhere")
        if self._old.exists():
            raise OutputError(f"'{self._old}' is in the way.", "move it elsewhere; it may hold files of yours")

    @property
    def keeps_card(self) -> bool:
        """Whether a model card lies there that slimrank did not write, or that was changed since."""
        return (self.path / CARD).is_file() and CARD not in _written_by_us(self.path)

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """A temporary folder to write into; it becomes the output folder when the context ends without an error.

        Raises:
            OutputError: the disk is full or cannot be written; nothing is left behind.
        """
        try:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
            (self._partial / _MARK).touch()
            yield self._partial
            self._publish()
            (self.path / _MARK).unlink()
        except OSError as error:
            shutil.rmtree(self._partial, ignore_errors=True)
            raise error if isinstance(error, OutputError) else disk_error(error, self.path) from error

    def _publish(self) -> None:
        if not self.path.exists():
            self._partial.rename(self.path)
            return
        self.path.rename(self._old)
        try:
            self._partial.rename(self.path)
        except OSError:
            self._old.rename(self.path)
            raise
        for name in _written_by_us(self._old):
            (self._old / name).unlink(missing_ok=True)
        for foreign in list(self._old.iterdir()):
            if (self.path / foreign.name).exists():
                raise OutputError(
                    f"'{foreign}' was not written by slimrank and was kept there.", "look at it and move it"
                )
            foreign.rename(self.path / foreign.name)
        self._old.rmdir()


def need_space(path: Path, needed: int) -> None:
    """Make sure that the disk of `path` has room.

    Raises:
        OutputError: it has not.
    """
    home = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(home).free
    if free < needed:
        raise OutputError(
            f"the disk of '{path}' has {free / 1e9:.2f} GB free; about {needed / 1e9:.2f} GB are needed.",
            "free some space or choose another folder",
        )


def write_manifest(folder: Path, provenance: dict[str, Any]) -> None:
    """Write slimrank.json: the provenance, and name, size and sha256 of every file that slimrank wrote."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != _MARK and path.name not in REPORTS
    }
    content = {**provenance, "files": files, "reports": list(REPORTS)}
    write_text(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


def _written_by_us(folder: Path) -> list[str]:
    """Names in the manifest; not that of a model card which was changed since: people write on in them."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return []
    content = json.loads(manifest.read_text(encoding="utf-8"))
    card = content["files"].get(CARD)
    if card is not None and (folder / CARD).is_file() and _sha256(folder / CARD) != card["sha256"]:
        del content["files"][CARD]
    return [MANIFEST, *content["files"], *content["reports"]]


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            total.update(chunk)
    return total.hexdigest()
