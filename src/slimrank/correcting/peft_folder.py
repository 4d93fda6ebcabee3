"""Write a correction as a LoRA adapter of the library PEFT, with ranks of its own for every layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from slimrank.store import write_text

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."

Factors = Mapping[str, tuple[Tensor, Tensor]]  # path of a layer -> A (rank x n) and B (m x rank)


def write_peft(factors: Factors, base: str, transposed: bool, folder: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json.

    Args:
        factors: of each layer; adapters are multiplied by 1.
        base: what the adapter belongs to, by name.
        transposed: whether the model stores its weights in x out (`Conv1D`).
        folder: exists already.
    """
    tensors: dict[str, Tensor] = {}
    for path, (a, b) in factors.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    write_text(folder / CONFIG, json.dumps(_config(factors, base, transposed), indent=2) + "\n")


def _config(factors: Factors, base: str, transposed: bool) -> dict[str, Any]:
    ranks = {path: len(a) for path, (a, _) in factors.items()}
    largest = max(ranks.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "lora_dropout": 0.0,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,  # alpha / rank is 1 everywhere
        "target_modules": sorted(ranks),
    }


def adapter_bytes(factors: Factors) -> int:
    """Count the bytes of all numbers."""
    return sum(t.numel() * t.element_size() for pair in factors.values() for t in pair)


def cast(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return both factors in a dtype."""
    return a.to(dtype), b.to(dtype)
