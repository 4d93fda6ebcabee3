"""GGUF files, dequantised to ordinary dense weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForCausalLM

from slimrank.models.explained import explained
from slimrank.models.leftovers import check_taken
from slimrank.models.quantised import forget_quantisation
from slimrank.models.storage import torch_dtype
from slimrank.models.tokenizers import load_tokenizer


def gguf_place(path: Path) -> dict[str, Any]:
    """Say where a GGUF file is, in the arguments of transformers."""
    return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}


def load_gguf(place: Mapping[str, Any], dtype: str) -> tuple[Any, Any, list[str]]:
    """Load a GGUF file as a dense model, with its tokenizer and notes on what was left out.

    Args:
        place: see `gguf_place`.
        dtype: "auto" is float32.

    Raises:
        ModelError: the file is damaged, or lacks weights.
        MissingExtraError: the package `gguf` is missing.
    """
    tokenizer = load_tokenizer(_path(place), place)
    model, notes = load_dense(place, dtype)
    return model, tokenizer, notes


def load_dense(place: Mapping[str, Any], dtype: str) -> tuple[Any, list[str]]:
    """Load the weights of a GGUF file as a dense model, with notes on what was left out; see `load_gguf`."""
    path = _path(place)
    with explained(path):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **place,
            dtype=torch_dtype("float32" if dtype == "auto" else dtype),
            output_loading_info=True,
            trust_remote_code=False,
            **_dense(),
        )
    model, info = loaded
    notes = check_taken(path, model, info, ())
    # transformers may leave its quantizer on a model that is dense by now; saving would then refuse.
    forget_quantisation(model)
    return model, notes


def _path(place: Mapping[str, Any]) -> Path:
    return Path(place["pretrained_model_name_or_path"]) / place["gguf_file"]


def _dense() -> dict[str, Any]:
    """Ask for dense weights; before it had `GgufConfig`, transformers gave no others."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}
