"""Turn errors of other libraries during loading into slimrank's own, which name the cause."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from slimrank.errors import MissingExtraError, ModelError, SlimrankError

WHAT_MODEL_MAY_BE = "give a hub id (org/name), a folder with config.json, a .gguf file, or demo"
DAMAGED = "the files are damaged or belong to another configuration; download the model again"
UNKNOWN = "config.json may be damaged, or may need a newer transformers: pip install --upgrade transformers"

_FILE_ERRORS = (
    SafetensorError, struct.error, pickle.UnpicklingError, EOFError, json.JSONDecodeError, UnicodeDecodeError,
    RuntimeError,
)  # fmt: skip
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@contextmanager
def explained(spec: str | Path, what: str = "model") -> Iterator[None]:
    """Turn any error inside the context into a `ModelError` that names the model and gives the reason.

    Args:
        spec: the model, as the user named it.
        what: the part that is read.

    Raises:
        ModelError: something was raised.
        MissingExtraError: a package that reads GGUF files is missing.
    """
    try:
        yield
    except (SlimrankError, MemoryError):
        raise
    except Exception as error:  # libraries raise nearly every class here
        if _out_of_memory(error):
            raise
        if isinstance(error, ImportError) and str(spec).endswith(".gguf"):
            raise MissingExtraError("gguf", "demo", "reading a GGUF file") from error
        raise ModelError(f"the {what} '{spec}' cannot be loaded: {reason_of(error)}", _hint(error)) from error


def reason_of(error: Exception) -> str:
    """Return the first line of an error message, and the next where the first announces it; else the class."""
    if isinstance(error, pickle.UnpicklingError):
        return "a .bin file holds something other than tensors, which slimrank never runs, or is damaged"
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if isinstance(error, LookupError) or not lines:
        return f"{type(error).__name__} {''.join(lines[:1])}".strip()
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def _hint(error: Exception) -> str:
    if isinstance(error, ImportError):
        return "install the named package"
    if isinstance(error, pickle.UnpicklingError):
        return "use the .safetensors files of the model, or download it again"
    if isinstance(error, _FILE_ERRORS):
        return DAMAGED
    return WHAT_MODEL_MAY_BE if isinstance(error, OSError) else UNKNOWN


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
