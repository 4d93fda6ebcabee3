"""Load models that others have quantised: GGUF files, and folders that transformers loads with its quantisers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from slimrank.models.explained import explained
from slimrank.models.load import load_model, resolve
from slimrank.models.quantised import quantisation_of
from slimrank.progress import Progress


def load_quantised(spec: str | Path, progress: Progress) -> Any:
    """Load a model whose linear layers may be quantised, on the CPU.

    Args:
        spec: hub id, folder or GGUF file. What slimrank itself has quantised counts, too.
        progress: told of what loading changes.

    Raises:
        ModelError: it cannot be loaded.
    """
    source = resolve(spec, progress)
    if source.endswith(".gguf"):
        return load_model(spec, "float32", progress).model
    with explained(spec):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if hasattr(config, "slimrank") or quantisation_of(config.to_dict()) is None:
        return load_model(spec, "float32", progress).model
    with explained(spec):
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False).eval()
