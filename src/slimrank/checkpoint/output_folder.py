"""The output folder: all or nothing, and never a file of someone else's deleted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from slimrank.errors import OutputError
from slimrank.store import disk_error, write_text

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
        OutputError: the folder exists and may not be replaced, or cannot be looked into.
    """

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        try:
            self.path = path = path.expanduser().resolve()
            if not path.name:
                raise OutputError(f"'{path}' cannot hold a model.", "give a folder that does not exist yet")
            self._partial = path.with_name(path.name + ".partial")
            self._old = path.with_name(path.name + ".old")
            self._check_path(overwrite)
            self._check_neighbours()
        except (OSError, ValueError, RuntimeError) as error:  # names that no disk allows, and unknown users (~name)
            raise _explained(error, path) from error

    def _check_path(self, overwrite: bool) -> None:
        path = self.path
        if path.is_file():
            raise OutputError(f"'{path}' is a file.", "give a folder that does not exist yet")
        if not path.exists():
            return
        if any(path.iterdir()) and not overwrite:
            raise OutputError(f"the output folder '{path}' exists.", "--overwrite, or another --out")
        if any(path.iterdir()) and not (path / MANIFEST).is_file():
            raise OutputError(
                f"'{path}' was not written by slimrank (it has no {MANIFEST}), so it is not overwritten.",
                "choose another --out",
            )
        self._check_old()

    def _check_old(self) -> None:
        """Make sure that the folder that is there can be replaced, and the files in it removed."""
        for place in (self.path, *self.path.iterdir()):
            if place.is_mount():
                raise OutputError(f"'{place}' is a mount point, which cannot be replaced.", f"--out '{place}/model'")
        for folder in {self.path, *(self.path / name for name in _folders(_written_by_us(self.path)))}:
            if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
                raise OutputError(f"nothing can be removed from '{folder}'.", "check its permissions")

    def _check_neighbours(self) -> None:
        around = next(folder for folder in self.path.parents if folder.exists())
        if not os.access(around, os.W_OK | os.X_OK):
            raise OutputError(f"nothing can be written to '{around}'.", "check its permissions, or another --out")
        if self._partial.exists() and not (self._partial / _MARK).is_file():
            raise OutputError(f"'{self._partial}' is in the way.", "move it elsewhere")
        if self._old.exists():
            raise OutputError(f"'{self._old}' is in the way.", "move it elsewhere; it may hold files of yours")

    @property
    def keeps_card(self) -> bool:
        """Whether a model card lies there that slimrank did not write, or that was changed since."""
        return (self.path / CARD).is_file() and CARD not in _written_by_us(self.path)

    def rehearse(self) -> None:
        """Make, rename and remove a folder beside the output, and move the old output there and back.

        Raises:
            OutputError: one of this is impossible.
        """
        trial = self.path.with_name(f"{self.path.name}.trial-{os.getpid()}")
        try:
            with _absent_again(trial):
                trial.mkdir(parents=True)
                trial.rename(trial.with_name(trial.name + "-renamed")).rmdir()
            if self.path.exists():
                self.path.rename(self._old)
                self._old.rename(self.path)
        except OSError as error:
            raise disk_error(error, self.path) from error

    def check_names(self, files: Path) -> None:
        """Make sure that new files take the name of no file of someone else's.

        Args:
            files: a folder with files as they will be written.

        Raises:
            OutputError: one does.
        """
        ours = _written_by_us(self.path)
        for file in sorted(path for path in files.rglob("*") if path.is_file()):
            name = file.relative_to(files).as_posix()
            if name not in ours and (self.path / name).exists() and not _same(self.path / name, file):
                raise OutputError(
                    f"'{self.path / name}' was not written by slimrank, and the new model has a file of that name.",
                    "move it elsewhere, or choose another --out",
                )

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """Yield a temporary folder to write into; it becomes the output folder when the context ends without an error.

        Raises:
            OutputError: the disk is full or cannot be written; nothing is left behind.
        """
        try:
            self._begin()
            yield self._partial
            self._publish()
        except OSError as error:
            shutil.rmtree(self._partial, ignore_errors=True)
            raise _explained(error, self.path) from error

    def _begin(self) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        (self._partial / _MARK).touch()

    def _publish(self) -> None:
        replaces = self.path.exists()
        if replaces:
            self.path.rename(self._old)
        try:
            self._partial.rename(self.path)
        except OSError:
            if replaces:
                self._old.rename(self.path)
            raise
        (self.path / _MARK).unlink()
        if replaces:
            self._take_apart_old()

    def _take_apart_old(self) -> None:
        """Delete what slimrank wrote; put everything else into the new folder.

        Raises:
            OutputError: something has to stay where it is.
        """
        try:
            names = _written_by_us(self._old)
            for name in names:
                (self._old / name).unlink(missing_ok=True)
            for folder in sorted(_folders(names), reverse=True):
                if (self._old / folder).is_dir() and not any((self._old / folder).iterdir()):
                    (self._old / folder).rmdir()
            for foreign in list(self._old.iterdir()):
                _move(foreign, self.path / foreign.name)
            self._old.rmdir()
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(
                f"the model is written to '{self.path}', but '{self._old}' cannot be removed: {error}",
                "look whether it holds files of yours, then delete it",
            ) from error


@contextmanager
def _absent_again(folder: Path) -> Iterator[None]:
    """Remove a folder and those around it in the end, if they are empty and were not there before."""
    absent = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    finally:
        for place in absent:
            with suppress(OSError):
                place.rmdir()


def _move(foreign: Path, place: Path) -> None:
    """Move a file or folder; a folder that is there already takes in what the other holds.

    Raises:
        OutputError: another file of that name is there.
    """
    if not place.exists():
        foreign.rename(place)
    elif foreign.is_dir() and place.is_dir():
        for inside in list(foreign.iterdir()):
            _move(inside, place / inside.name)
        foreign.rmdir()
    elif _same(foreign, place):
        foreign.unlink()
    else:
        raise OutputError(f"'{foreign}' was not written by slimrank and was kept there.", "look at it and move it")


def _same(one: Path, other: Path) -> bool:
    """Tell whether two paths are files of the same content."""
    return one.is_file() and other.is_file() and sha256_of(one) == sha256_of(other)


def _explained(error: Exception, path: Path) -> OutputError:
    return error if isinstance(error, OutputError) else disk_error(error, path)


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
    written = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    files = {
        name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for name, path in sorted(written.items())
        if name not in (_MARK, *REPORTS)
    }
    content = {**provenance, "files": files, "reports": list(REPORTS)}
    write_text(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the content of slimrank.json; "files": name -> bytes and sha256, and "reports": names, are there.

    Raises:
        OutputError: it is damaged, or names files outside the folder.
    """
    manifest = folder / MANIFEST
    try:
        content: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
        names = [*content["files"], *content["reports"]]
        content["files"].get(CARD, {"sha256": None})["sha256"]
        if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in names):
            raise ValueError("it names files outside the folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(
            f"'{manifest}' does not say which files slimrank wrote: {error}", "choose another --out"
        ) from error
    return content


def _written_by_us(folder: Path) -> list[str]:
    """List the names in the manifest, except a model card that was changed since: people continue to write in them.

    Raises:
        OutputError: the manifest is damaged, or names files outside the folder.
    """
    if not (folder / MANIFEST).is_file():
        return []
    content = read_manifest(folder)
    card = content["files"].get(CARD, {"sha256": None})["sha256"]
    changed = (folder / CARD).is_file() and sha256_of(folder / CARD) != card
    return [name for name in (MANIFEST, *content["files"], *content["reports"]) if name != CARD or not changed]


def _folders(names: list[str]) -> set[str]:
    """Return the folders inside an output folder that files of these names lie in."""
    return {str(parent) for name in names for parent in PurePosixPath(name).parents if parent.name}


def sha256_of(path: Path) -> str:
    """Return the digest of a file."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            total.update(chunk)
    return total.hexdigest()
