"""The packages of the engine: whether they are here, and new enough."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

from packaging.version import Version

from slimrank.errors import MissingExtraError, SlimrankError

EXTRA = "openvino"
LEAST = {"openvino": "2026.4", "nncf": "3.4", "openvino_tokenizers": "2026.4"}  # the first versions that were tried


def need(module: str, purpose: str) -> Any:
    """Import a package of the engine.

    Args:
        module: its name; a key of `LEAST`.
        purpose: what it is needed for, as the subject of a sentence.

    Raises:
        MissingExtraError: it is not installed.
        SlimrankError: it is too old.
    """
    try:
        found = metadata.version(module)
    except metadata.PackageNotFoundError as error:
        raise MissingExtraError(module, EXTRA, purpose) from error
    if Version(found) < Version(LEAST[module]):
        raise SlimrankError(
            f"{purpose} needs {module} {LEAST[module]} or newer; {found} is installed.",
            f"pip install --upgrade 'slimrank[{EXTRA}]'",
        )
    return importlib.import_module(module)
