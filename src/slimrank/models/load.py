"""Load a model and its tokenizer: a hub id, a local folder, a GGUF file, or the word "demo"."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from slimrank.errors import MissingExtraError, ModelError, NonFiniteError
from slimrank.export.register import register
from slimrank.models.demo import demo_folder
from slimrank.progress import Progress

INDEX = "model.safetensors.index.json"


def load(spec: str | Path, dtype: str = "auto", progress: Progress | None = None) -> tuple[PreTrainedModel, Any]:
    """A causal language model on the CPU, and its tokenizer.

    Args:
        spec: hub id, local folder, .gguf file, or "demo".
        dtype: "auto" (as in the checkpoint), "float32", "bfloat16" or "float16".
        progress: told when the demo model is fetched.

    Raises:
        ModelError: unknown model, missing file or shard, weights that the checkpoint lacks.
        MissingExtraError: a GGUF file without the package `gguf`.
    """
    register()
    source = resolve(spec, progress)
    if source.endswith(".gguf"):
        return load_gguf(Path(source), dtype)
    _check_shards(Path(source))
    with _explained(spec):
        tokenizer = AutoTokenizer.from_pretrained(source)
        auto = _auto_class(AutoConfig.from_pretrained(source))
        loaded: Any = auto.from_pretrained(source, dtype=_dtype(dtype), output_loading_info=True)
    model, info = loaded
    _check_complete(info, spec)
    return model, tokenizer


def load_gguf(path: Path, dtype: str) -> tuple[PreTrainedModel, Any]:
    """A GGUF file, dequantised to ordinary dense weights."""
    from transformers import GgufConfig

    with _explained(path):
        place: Any = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        tokenizer = AutoTokenizer.from_pretrained(**place)
        model: Any = AutoModelForCausalLM.from_pretrained(
            **place,
            dtype=_dtype("float32" if dtype == "auto" else dtype),
            quantization_config=GgufConfig(dequantize=True),
        )
    # transformers may leave its quantizer on a model that is dense by now; saving would then refuse.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def skeleton(spec: str | Path, progress: Progress | None = None) -> PreTrainedModel:
    """The model with no weights (meta device): only its configuration is read.

    Raises:
        ModelError: unknown model, or one that is not a causal language model.
        MissingExtraError: a GGUF file without the package `gguf`.
    """
    register()
    source = resolve(spec, progress)
    place: dict[str, Any] = {"pretrained_model_name_or_path": source}
    if source.endswith(".gguf"):
        place = {"pretrained_model_name_or_path": Path(source).parent, "gguf_file": Path(source).name}
    with _explained(spec):
        config = AutoConfig.from_pretrained(**place)
        with torch.device("meta"):
            model = _auto_class(config).from_config(config)
        model.tie_weights()
    return model


def stored_dtype(model: nn.Module) -> torch.dtype:
    """The dtype in which most parameters of a model (or its configuration, on meta) are stored."""
    config_dtype = getattr(getattr(model, "config", None), "dtype", None)
    first = next(model.parameters())
    return config_dtype if first.is_meta and isinstance(config_dtype, torch.dtype) else first.dtype


def resolve(spec: str | Path, progress: Progress | None = None) -> str:
    """A local path or hub id that transformers understands.

    Raises:
        ModelError: a path that does not exist or holds no model.
    """
    if str(spec) == "demo":
        return str(demo_folder(progress))
    path = Path(spec).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return str(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"the folder '{path}' holds no model: it has no config.json.", _WHAT_MODEL_MAY_BE)
        return str(path)
    if path.exists() or str(spec).startswith((".", "/", "~")) or path.suffix == ".gguf":
        raise ModelError(f"'{spec}' is not a model folder or GGUF file.", _WHAT_MODEL_MAY_BE)
    return str(spec)


_WHAT_MODEL_MAY_BE = "a hub id (org/name), a folder with config.json, a .gguf file, or the word demo"


def shard_names(folder: Path) -> set[str]:
    """The weight files that the index of a folder names; none where it has no index."""
    index = folder / INDEX
    return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.is_file() else set()


def digest(model: Any) -> str:
    """sha256 over the configuration and the names, dtypes, shapes and bytes of all weights; checks them on the way.

    Raises:
        NonFiniteError: NaN or infinity in a parameter.
        ModelError: a parameter that is not in memory.
    """
    total = hashlib.sha256(_configuration(model).encode())
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if p.is_meta:
            raise ModelError(f"the weight '{name}' is not in memory.", "load the model without disk offload")
        if isinstance(p, nn.Parameter) and not bool(torch.isfinite(p).all()):
            raise NonFiniteError(f"NaN or infinity in the weight '{name}'.", "check the checkpoint; load it in float32")
        total.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
        total.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _configuration(model: Any) -> str:
    """What the configuration says about the computation, whoever saved it and wherever."""
    config = getattr(model, "config", None)
    if config is None:
        return ""
    aside = ("transformers_version", "_name_or_path", "architectures", "dtype")
    fields = {k: v for k, v in config.to_dict().items() if k not in aside}
    return json.dumps([fields, getattr(config, "_attn_implementation", None)], sort_keys=True, default=str)


def _auto_class(config: Any) -> Any:
    """What builds a language model of this configuration; models that read images, too, have a class of their own."""
    reads_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    only = reads_images and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if only else AutoModelForCausalLM


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _dtype(name: str) -> Any:
    return name if name == "auto" else getattr(torch, name)


def _check_shards(folder: Path) -> None:
    named = shard_names(folder)
    missing = sorted(name for name in named if not (folder / name).is_file())
    if missing:
        raise ModelError(
            f"'{folder}' lacks {len(missing)} of {len(named)} weight files: {', '.join(missing[:3])}.",
            "download the model again",
        )


def _check_complete(info: dict[str, Any], spec: str | Path) -> None:
    missing = sorted(info.get("missing_keys") or [])
    if missing:
        raise ModelError(
            f"the checkpoint '{spec}' lacks {len(missing)} weights, e.g. '{missing[0]}'.",
            "it may belong to another architecture, or be incomplete; download it again",
        )


@contextmanager
def _explained(spec: str | Path) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        if str(spec).endswith(".gguf"):
            raise MissingExtraError("gguf", "demo", "reading a GGUF file") from error
        raise
    except OSError as error:
        raise ModelError(f"the model '{spec}' cannot be loaded: {_reason(error)}", _WHAT_MODEL_MAY_BE) from error
    except (SafetensorError, struct.error, RuntimeError) as error:
        raise ModelError(
            f"the model '{spec}' cannot be loaded: {_reason(error)}",
            "its weight files are damaged or belong to another configuration; download it again",
        ) from error
    except (ValueError, KeyError) as error:
        raise ModelError(
            f"the model '{spec}' cannot be loaded: {_reason(error)}",
            "it may be no causal language model, or need a newer transformers, or code of its own",
        ) from error
