"""The generation configuration of a model: transformers silently replaces a damaged one by its defaults."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from slimrank.checkpoint.processor import find_file
from slimrank.models.explained import explained


def check_generation(spec: str | Path, source: str) -> None:
    """Make sure that the generation configuration of a model can be read, if there is one.

    Args:
        spec: the model, as the user named it.
        source: its hub id or folder.

    Raises:
        ModelError: it cannot be read.
    """
    path = find_file(source, GENERATION_CONFIG_NAME)
    if path is not None:
        with explained(spec, "generation configuration of"):
            GenerationConfig.from_pretrained(path.parent)
