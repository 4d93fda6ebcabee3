"""The files of a model: which weight files transformers reads, whether they are complete, which tensors they hold."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimrank.errors import ModelError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ADAPTER = "adapter_config.json"

_POINTER = b"version https://git-lfs"
_TEXTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")
_AGAIN = "download the model again"


@dataclass(frozen=True)
class StoredTensor:
    """Dtype (in the words of safetensors: "BF16") and shape of a tensor in a file."""

    dtype: str
    shape: tuple[int, ...]


def weight_files(folder: Path, named: str | None = None) -> list[Path]:
    """List the weight files that transformers would read from a folder; they may be missing.

    Args:
        folder: a local folder.
        named: the file that config.json names as `transformers_weights`.

    Raises:
        ModelError: the index of the files is damaged.
    """
    for name in [named] if named else [SINGLE, INDEX, PICKLED, PICKLED_INDEX]:
        path = folder / name
        if path.is_file():
            return _shards(path) if name.endswith(".index.json") else [path]
    return [folder / named] if named else []


def _shards(index: Path) -> list[Path]:
    _refuse_pointer(index)
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [index.parent / name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"'{index}' is not an index of weight files.", _AGAIN) from error


def check_files(folder: Path, named: str | None = None) -> list[Path]:
    """Make sure that all weight files of a folder exist and are complete; return them.

    Raises:
        ModelError: there are none, some are missing, cut off, or pointers of Git LFS.
    """
    files = weight_files(folder, named)
    if not files:
        raise ModelError(f"'{folder}' has no weights that transformers reads{_others(folder)}.", _AS_EXPECTED)
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ModelError(
            f"'{folder}' lacks {len(missing)} of {len(files)} weight files: {', '.join(missing[:3])}.", _AGAIN
        )
    for path in files:
        _refuse_pointer(path)
    stored_tensors(files)
    return files


_AS_EXPECTED = f"name the weights {SINGLE} or {PICKLED}, or add the index of the parts"


def _others(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.suffix in _WEIGHTS)
    return f"; it holds {', '.join(names[:3])}" if names else ""


def refuse_pointers(folder: Path) -> None:
    """Refuse a folder whose configuration or tokenizer are pointers of Git LFS.

    Raises:
        ModelError: one of them is.
    """
    for name in _TEXTS:
        _refuse_pointer(folder / name)


def _refuse_pointer(path: Path) -> None:
    if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(_POINTER):
        raise ModelError(
            f"'{path}' is a pointer of Git LFS, not the file itself.",
            "run git lfs install, then git lfs pull in the clone",
        )


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Read names, dtypes and shapes of the tensors in safetensors files; other files are left out.

    Raises:
        ModelError: a file is damaged or cut off.
    """
    found: dict[str, StoredTensor] = {}
    for path in files:
        if path.suffix == ".safetensors":
            for name, about in _header(path).items():
                found[name] = StoredTensor(about["dtype"], tuple(about["shape"]))
    return found


def _header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if not 2 <= length <= size - 8:
                raise ValueError("its header is longer than the file")
            content = json.loads(file.read(length))
        content.pop("__metadata__", None)
        end = max((about["data_offsets"][1] for about in content.values()), default=0)
        if 8 + length + end > size:
            raise ValueError(f"it has {size:,} of {8 + length + end:,} bytes")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"the model cannot be loaded: '{path}' is damaged or cut off: {error}.", _AGAIN) from error
    return dict(content)


def total_bytes(files: Iterable[Path]) -> int:
    """Add up the sizes of files."""
    return sum(path.stat().st_size for path in files)
