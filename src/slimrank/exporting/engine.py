"""The packages of the engines: whether they are here, and new enough."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

from packaging.version import Version

from slimrank.errors import MissingExtraError, SlimrankError

LEAST = {  # extra -> package -> the first version that was tried
    "openvino": {"openvino": "2026.4", "nncf": "3.4", "openvino_tokenizers": "2026.4"},
    "gguf": {"gguf": "0.17"},
    "onnx": {"onnx": "1.23", "onnx_ir": "1.1", "onnxscript": "0.7", "onnxruntime": "1.32"},
}


def need(module: str, purpose: str) -> Any:
    """Import a package of an engine.

    Args:
        module: its name; a key of one of the extras in `LEAST`.
        purpose: what it is needed for, as the subject of a sentence.

    Raises:
        MissingExtraError: it is not installed.
        SlimrankError: it is too old.
    """
    extra, least = next((extra, packages[module]) for extra, packages in LEAST.items() if module in packages)
    try:
        found = metadata.version(module)
    except metadata.PackageNotFoundError as error:
        raise MissingExtraError(module, extra, purpose) from error
    if Version(found) < Version(least):
        raise SlimrankError(
            f"{purpose} needs {module} {least} or newer; {found} is installed.",
            f"pip install --upgrade 'slimrank[{extra}]'",
        )
    return importlib.import_module(module)


def version_of(module: str) -> str:
    """Return the version of a package that is here."""
    return metadata.version(module)
