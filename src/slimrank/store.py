"""The run directory stores the finished parts of a compression, so that an interrupted one resumes.

Everything has a key made of all that the content depends on (weights, tokens, method, device, code
schema). safetensors and JSON only, each file written under a temporary name and then renamed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slimrank.errors import OutputError, RunError, SlimrankError

LOCK, MANIFEST = "lock", "run.json"
SCHEMA = 4  # raise it when the content of stored files changes meaning


def content_key(parts: dict[str, Any]) -> str:
    """Return a short hash of everything in `parts`."""
    text = json.dumps({"schema": SCHEMA, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def locked(folder: Path, hint: str) -> FileLock:
    """Lock a folder against other processes inside the context.

    Raises:
        RunError: another slimrank uses it.
        OutputError: no file can be made or locked there.
    """
    lock = FileLock(folder / LOCK, is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunError(f"another slimrank is at work in the folder '{folder}'.", hint) from error
    except (OSError, NotImplementedError) as error:  # the latter on disks without locks
        raise disk_error(error, folder) from error
    return lock


class Run:
    """A run directory.

    Args:
        folder: created if absent.
        identity: what the run belongs to (model and text digests, ...).

    Raises:
        RunError: the folder belongs to a different run, or is not a run directory.
        OutputError: it cannot be made.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        manifest = folder / MANIFEST
        try:
            if manifest.is_file():
                _check_identity(folder, json.loads(manifest.read_text(encoding="utf-8")), identity)
            else:
                _refuse_foreign(folder)
                folder.mkdir(parents=True, exist_ok=True)
                write_text(manifest, json.dumps(identity, indent=1) + "\n")
        except (OSError, json.JSONDecodeError) as error:
            raise _unusable(folder, error) from error

    def __enter__(self) -> Run:
        """Keep other processes out of the folder.

        Raises:
            RunError: another slimrank uses it.
        """
        self._lock = locked(self.folder, "wait for it to end, or give this one a --run-dir of its own")
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def store(self, parts: dict[str, Any]) -> Store:
        """Return the stored results of one stage, under the key of everything that they depend on."""
        return Store(self.place(parts))

    def place(self, parts: dict[str, Any]) -> Path:
        """Return the folder of a store."""
        return self.folder / "store" / content_key(parts)


def usable_folder(run_dir: str | Path, output: Path | None = None) -> Path:
    """Find the run directory that a user names; refuse one that cannot be used, before any work.

    Args:
        run_dir: as the user named it.
        output: the folder that the model is written to. It is replaced as a whole at the end.

    Raises:
        RunError: it is in the output folder, or holds something else.
        OutputError: it is not a folder, or cannot be read.
    """
    try:
        folder = Path(run_dir).expanduser().resolve()
        replaced = [] if output is None else [output.with_name(output.name + end) for end in ("", ".partial", ".old")]
        if any(folder.is_relative_to(place) for place in replaced):
            raise RunError(f"the run directory '{folder}' is in the output folder.", f"--run-dir '{output}.run'")
        _refuse_foreign(folder)
    except (OSError, ValueError, RuntimeError) as error:  # names that no disk allows, and unknown users (~name)
        if isinstance(error, SlimrankError):
            raise
        raise _unusable(run_dir, error) from error
    return folder


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise RunError(f"'{folder}' exists and is not a run directory of slimrank.", "choose another folder")


def _unusable(folder: str | Path, error: Exception) -> OutputError:
    return OutputError(f"the run directory '{folder}' cannot be used: {error}", "choose another folder")


def remove_run(folder: Path) -> None:
    """Delete what a run has stored; anything else in the folder stays.

    Raises:
        OutputError: it cannot be deleted.
    """
    shutil.rmtree(folder / "store", ignore_errors=True)
    try:
        (folder / MANIFEST).unlink(missing_ok=True)
        (folder / LOCK).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
    except OSError as error:
        raise OutputError(
            f"the model is written, but the run directory '{folder}' cannot be removed: {error}", "delete it yourself"
        ) from error


class Store:
    """Named tensors and records of one stage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, folder) from error

    def has(self, name: str) -> bool:
        """Tell whether the tensors `name` are stored."""
        return (self.folder / f"{name}.safetensors").is_file()

    def save(self, name: str, tensors: dict[str, Tensor], about: dict[str, Any] | None = None) -> None:
        """Store tensors and a JSON record.

        Raises:
            OutputError: the disk is full or cannot be written.
        """
        path = self.folder / f"{name}.safetensors"
        partial = path.with_suffix(".partial")
        try:
            save_file({k: t.contiguous() for k, t in tensors.items()}, partial, {"about": json.dumps(about or {})})
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise disk_error(error, path) from error

    def save_parts(self, name: str, tensors: dict[str, Tensor], about: dict[str, Any] | None = None) -> None:
        """Store tensors of which every process has a part; here there is one process."""
        self.save(name, tensors, about)

    def drop(self, name: str) -> None:
        """Delete what is stored as `name`, if anything is."""
        (self.folder / f"{name}.safetensors").unlink(missing_ok=True)

    def load(self, name: str, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors and the record stored as `name`.

        Raises:
            RunError: the file is absent or damaged.
        """
        path = self.folder / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt", device=device) as file:
                about = json.loads(file.metadata()["about"])
                return {key: file.get_tensor(key) for key in file.keys()}, about  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise RunError(f"'{path}' cannot be read: {error}", "delete the run directory and start again") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files may be no Unicode
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise disk_error(error, path) from error


def disk_error(error: Exception, path: Path) -> OutputError:
    """Make the error to raise when writing `path` failed; a full disk may be mended, so that the run resumes."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
    resumes = "free some disk space; running the same command again resumes"
    hint = resumes if full else "check its permissions and those of the folder around it, or choose another folder"
    return OutputError(f"'{path}' cannot be written: {error}", hint)


def _check_identity(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    differing = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
    if differing:
        shown = "; ".join(f"{key}: {_short(found.get(key))}, now {_short(wanted.get(key))}" for key in differing)
        raise RunError(
            f"the run directory '{folder}' belongs to a different run ({shown}).",
            "choose another --run-dir or --out, or delete that folder to start afresh",
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."
