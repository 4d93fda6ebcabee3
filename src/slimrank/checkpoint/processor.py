"""The processor of a model that reads more than text: its files, as they are where the model came from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import cached_file

FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
TEMPLATES = ("chat_template.json", "chat_template.jinja")  # where the tokenizer does not carry it


def copy_processor(model: Any, origin: str, folder: Path) -> list[str]:
    """Copy the processor of a model that reads images; nothing for a model that reads text alone.

    Args:
        model: tells whether it reads images.
        origin: hub id or folder of the original; empty where it is not known.
        folder: where to.

    Returns:
        Notes for the report.
    """
    if type(model).__name__ not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values():
        return []
    found = [path for name in FILES if origin and (path := find_file(origin, name)) is not None]
    for path in [*found, *(path for name in TEMPLATES if found and (path := find_file(origin, name)) is not None)]:
        if not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
    return [] if found else ["no processor of images was found beside the original: load it from where that has one"]


def find_file(source: str, name: str) -> Path | None:
    """Find a file of a folder or hub repository; None where there is none or the hub cannot be reached."""
    try:
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):  # also what is neither a folder nor the name of a repository
        return None
    return None if path is None else Path(path)
