"""The architectures that are written as GGUF: what llama.cpp computes for them, and what it needs to know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimrank.errors import ModelError

ELSEWHERE = "slimrank export --to openvino or onnx"
PATTERN = 6  # of Gemma 3: every sixth block attends to all tokens
ROTARY = ("self_attn.q_proj", "self_attn.k_proj")


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        name: in GGUF.
        activation: of its MLPs.
        check: configuration -> what is in it that llama.cpp does not compute; "" if nothing.
        change: (path of a parameter, value, configuration) -> the value that GGUF holds.
    """

    name: str
    activation: str
    check: Callable[[Any], str]
    change: Callable[[str, Tensor, Any], Tensor]


def architecture_of(model: Any) -> Architecture:
    """Return the architecture of a model.

    Raises:
        ModelError: it is not one of those that are known here, or llama.cpp would compute something else.
    """
    config, what = model.config, type(model).__name__
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"{what} cannot be written as GGUF here: its model_type is none of {known}.", ELSEWHERE)
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    wrong = f"its MLPs have the activation {activation}" if activation != found.activation else found.check(config)
    if wrong:
        raise ModelError(f"{what} cannot be written as GGUF here: {wrong}.", ELSEWHERE)
    return found


def head_width(config: Any) -> int:
    """Return the width of one head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rotary(config: Any, kind: str = "full_attention") -> dict[str, Any]:
    """Return how positions are rotated, in blocks of a kind."""
    about = dict(config.rope_parameters or {})
    return dict(about.get(kind, about))


def _check_llama(config: Any) -> str:
    if config.attention_bias or config.mlp_bias:
        return "its layers have biases"
    kind = rotary(config).get("rope_type", "default")
    return "" if kind in ("default", "llama3", "linear") else f"its rotary positions are of the type {kind}"


def _check_qwen2(config: Any) -> str:
    slides = bool(getattr(config, "use_sliding_window", False)) and "sliding_attention" in config.layer_types
    kind = rotary(config).get("rope_type", "default")
    if slides:
        return "it attends through sliding windows"
    return "" if kind in ("default", "linear") else f"its rotary positions are of the type {kind}"


def _check_gemma3(config: Any) -> str:
    full = [kind == "full_attention" for kind in config.layer_types]
    if full != [(i + 1) % PATTERN == 0 for i in range(len(full))]:
        return "its blocks with a sliding window are others than the usual five of six"
    if config.query_pre_attn_scalar != head_width(config):
        return "its attention is scaled by another number than the width of a head"
    if config.attn_logit_softcapping or config.final_logit_softcapping:
        return "its logits are capped"
    kinds = {rotary(config, kind).get("rope_type", "default") for kind in ("full_attention", "sliding_attention")}
    return "" if kinds <= {"default", "linear"} else f"its rotary positions are of the types {', '.join(sorted(kinds))}"


def _change_llama(path: str, value: Tensor, config: Any) -> Tensor:
    """Put the rows of rotary layers that turn together beside each other: i and i + half of a head."""
    if path.rpartition(".")[0].endswith(ROTARY):
        half = head_width(config) // 2
        return value.reshape(-1, 2, half, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
    return value


def _change_nothing(path: str, value: Tensor, config: Any) -> Tensor:
    return value


def _change_gemma3(path: str, value: Tensor, config: Any) -> Tensor:
    """Add the one that norms of Gemma add themselves."""
    return value + 1 if path.endswith("norm.weight") else value


ARCHITECTURES = {  # model_type of transformers -> architecture
    "llama": Architecture("llama", "silu", _check_llama, _change_llama),
    "qwen2": Architecture("qwen2", "silu", _check_qwen2, _change_nothing),
    "gemma3_text": Architecture("gemma3", "gelu_pytorch_tanh", _check_gemma3, _change_gemma3),
}


def rope_factors(model: Any) -> Tensor | None:
    """Return what the frequencies of positions are divided by (half a head), where they are those of Llama 3."""
    about = rotary(model.config)
    if about.get("rope_type", "default") != "llama3":
        return None
    width = head_width(model.config)
    plain = about["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    found: Tensor = model.model.rotary_emb.inv_freq
    return plain / found.float().cpu()
