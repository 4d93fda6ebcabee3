"""Quantised checkpoints: recognised by their configuration, and refused or widened before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimrank.errors import ModelError
from slimrank.models.files import StoredTensor

WIDENED = ("fp8", "mxfp4")  # models are published in these alone; transformers turns them into dense weights
_KEYS = ("quantization_config", "compression_config", "quantization")  # the last is MLX
_NARROW = ("I8", "U8", "I16", "I32", "F8", "F4", "F6_")  # dtypes, in the words of safetensors
_WEIGHTS = ("weight", "qweight", "_packed", "_blocks")
_START = "start from the release in bfloat16 or float16, and quantise the result"


def quantisation_of(content: Mapping[str, Any]) -> str | None:
    """Name the quantisation that a configuration states, or None.

    Args:
        content: what config.json holds.
    """
    parts = [content, *(part for part in content.values() if isinstance(part, Mapping))]
    for about in (part.get(key) for part in parts for key in _KEYS):
        if about:
            return _method(about)
    dtypes = {str(part.get("dtype", part.get("torch_dtype"))) for part in parts}
    return next((name for name in sorted(dtypes) if _is_narrow(name)), None)


def _method(about: Any) -> str:
    if not isinstance(about, Mapping):
        return str(getattr(about, "quant_method", "of an unknown kind"))
    fallback = "bitsandbytes" if about.get("load_in_4bit") or about.get("load_in_8bit") else "of an unknown kind"
    return str(about.get("quant_method") or about.get("quant_algo") or fallback).lower()


def _is_narrow(name: str) -> bool:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    return isinstance(dtype, torch.dtype) and dtype.itemsize < 2


def check_quantisation(spec: str | Path, content: Mapping[str, Any]) -> str | None:
    """Refuse a checkpoint whose configuration says that it is quantised; return the method where it can be widened.

    Args:
        spec: the model, as the user named it.
        content: what its config.json holds.

    Raises:
        ModelError: it is quantised, and cannot be widened.
    """
    method = quantisation_of(content)
    if method is None or method in WIDENED:
        return method
    raise ModelError(f"the model '{spec}' is quantised ({method}); slimrank compresses dense weights.", _START)


def check_stored(spec: str | Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse a checkpoint that holds quantised weights, though its configuration does not say so.

    Args:
        spec: the model, as the user named it.
        tensors: what its files hold.

    Raises:
        ModelError: it does.
    """
    for name, tensor in tensors.items():
        if tensor.dtype.startswith(_NARROW) and name.endswith(_WEIGHTS):
            message = f"the model '{spec}' is quantised: '{name}' is stored as {tensor.dtype}."
            raise ModelError(message, _START)


def widened_config(config: Any) -> None:
    """Make a configuration ask for dense weights, in place."""
    about = config.quantization_config
    asked = about if isinstance(about, dict) else about.to_dict()
    config.quantization_config = {**asked, "dequantize": True}


def forget_quantisation(model: Any) -> None:
    """Remove the quantisation settings of a model with dense weights; saving would refuse or store them."""
    model.hf_quantizer = None
    model.is_quantized = False
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        if hasattr(config, "quantization_config"):
            del config.quantization_config


def check_dense(model: nn.Module) -> None:
    """Refuse a loaded model that is quantised, wholly or in part; it could not be saved after the work.

    Raises:
        ModelError: it is.
    """
    about = getattr(getattr(model, "config", None), "quantization_config", None)
    marked = about or getattr(model, "hf_quantizer", None) or getattr(model, "is_quantized", False)
    narrow = [f", e.g. '{name}' ({p.dtype})" for name, p in model.named_parameters() if _narrow_parameter(p)]
    if marked or narrow:
        what = "".join(narrow[:1])
        raise ModelError(f"{type(model).__name__} is quantised{what}; slimrank compresses dense weights.", _START)


def _narrow_parameter(p: nn.Parameter) -> bool:
    return not p.is_floating_point() or p.dtype.itemsize < 2
