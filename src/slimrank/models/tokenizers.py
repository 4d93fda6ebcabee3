"""Read the tokenizer of a model without custom code, and check that both fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from slimrank.errors import ModelError
from slimrank.models.explained import explained

_VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "tiktoken.model", "vocab.bpe", "merges.txt",
)  # fmt: skip


def load_tokenizer(spec: str | Path, place: Mapping[str, Any]) -> Any:
    """Load the tokenizer that belongs to a model.

    Args:
        spec: the model, as the user named it.
        place: `pretrained_model_name_or_path`, and `gguf_file` for a GGUF file.

    Raises:
        ModelError: there is none, it cannot be read, or it needs custom code.
    """
    folder = Path(str(place["pretrained_model_name_or_path"]))
    local = folder.is_dir() and "gguf_file" not in place
    if local and not any((folder / name).is_file() for name in _VOCABULARIES):
        _refuse_missing(spec, folder)
    with explained(spec, "tokenizer of"):
        try:
            return AutoTokenizer.from_pretrained(**place, trust_remote_code=False)
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise ModelError(
                f"the tokenizer of '{spec}' needs custom code, which slimrank never runs.",
                "save it as tokenizer.json, which needs no code",
            ) from error


def _refuse_missing(spec: str | Path, folder: Path) -> None:
    """Refuse a folder without a vocabulary, unless its tokenizer class needs no file (bytes, for example)."""
    with explained(spec, "tokenizer of"):
        try:
            names = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).vocab_files_names
        except Exception:  # whatever a library makes of a folder without a tokenizer
            names = {"": _VOCABULARIES[0]}
    if names:
        raise ModelError(
            f"'{spec}' has no tokenizer: {_VOCABULARIES[0]} is missing.",
            "copy tokenizer.json and tokenizer_config.json from the original model into the folder",
        )


def tokenizer_notes(model: Any, tokenizer: Any) -> list[str]:
    """Note tokens that the tokenizer has and the model's embedding does not."""
    embedding = model.get_input_embeddings()
    rows = getattr(getattr(embedding, "weight", None), "shape", (None,))[0]
    count = len(tokenizer)
    if rows is None or count <= rows:
        return []
    more = f"text with the other {count - rows:,} cannot be computed"
    return [f"the tokenizer has {count:,} tokens, the model's embedding {rows:,}: {more}"]
