"""What is saved beside the weights: configurations, tokenizer, processor. All of it can be tried before any work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import GENERATION_CONFIG_NAME

from slimrank.checkpoint.output_folder import OutputFolder
from slimrank.checkpoint.processor import copy_processor
from slimrank.errors import ModelError, SlimrankError
from slimrank.store import disk_error, write_text


def rehearse_saving(model: Any, tokenizer: Any, output: OutputFolder) -> None:
    """Write all but the weights into a scratch folder, as it will be written in the end.

    Raises:
        ModelError: transformers refuses to write a part of it.
        OutputError: a file of someone else's is in the way, or the scratch folder cannot be written.
    """
    with TemporaryDirectory(prefix="slimrank-") as scratch:
        try:
            with saving("configuration"):
                model.config.save_pretrained(scratch)
            save_companions(model, tokenizer, Path(scratch))
        except OSError as error:
            raise error if isinstance(error, SlimrankError) else disk_error(error, Path(scratch)) from error
        output.check_names(Path(scratch))


def save_companions(model: Any, tokenizer: Any, folder: Path) -> list[str]:
    """Write the generation configuration, the tokenizer and the processor into an existing folder.

    Returns:
        Notes for the report.

    Raises:
        ModelError: transformers refuses to write the tokenizer, or nobody can write the generation configuration.
        OSError: the folder cannot be written.
    """
    with saving("generation configuration"):
        notes = _save_generation(model, folder)
    if tokenizer is not None:
        with saving("tokenizer"):
            notes += _save_tokenizer(tokenizer, folder)
    return notes + copy_processor(model, str(getattr(model, "name_or_path", "")), folder)


def _save_generation(model: Any, folder: Path) -> list[str]:
    """Write the generation configuration; as it is, where transformers thinks it wrong."""
    config = getattr(model, "generation_config", None)
    if config is None or not model.can_generate():
        return []
    try:
        config.save_pretrained(folder)
    except ValueError as error:
        config.to_json_file(folder / GENERATION_CONFIG_NAME, use_diff=True)
        reason = " ".join(str(error).split())
        return [f"the generation configuration is written as it is, though transformers refuses to: {reason}"]
    return []


def _save_tokenizer(tokenizer: Any, folder: Path) -> list[str]:
    """Write the tokenizer; for a class of transformers itself without the code that the original names."""
    tokenizer.save_pretrained(folder)
    path = folder / TOKENIZER_CONFIG_FILE
    own = type(tokenizer).__module__.startswith("transformers.")
    content = json.loads(path.read_text(encoding="utf-8")) if own and path.is_file() else {}
    if not content.pop("auto_map", None):
        return []
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return ["the tokenizer is one of transformers itself; the code that it came with (auto_map) is left out"]


@contextmanager
def saving(what: str) -> Iterator[None]:
    """Say what it was that transformers refused to write.

    Raises:
        ModelError: it did.
    """
    try:
        yield
    except (OSError, SlimrankError):
        raise
    except Exception as error:  # tokenizers and configurations raise many unrelated classes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"the {what} cannot be saved: {reason}", f"make {what.split()[-1]}.save_pretrained(FOLDER) work first"
        ) from error
