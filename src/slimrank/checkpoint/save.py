"""Put factors into a model, and write the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from slimrank.checkpoint.companions import save_companions, saving
from slimrank.checkpoint.configuration_slimrank import mark_compressed
from slimrank.checkpoint.modeling_slimrank import keep_names, native_classes
from slimrank.checkpoint.quantization import quantization_config, read_by_others
from slimrank.errors import ModelError
from slimrank.layers.base import CompressedLinear, share_tensors
from slimrank.layers.factors import declare_ties
from slimrank.layers.forms import layer_form
from slimrank.layers.quantized import QuantizedWeights
from slimrank.layers.transforms import described, found_transforms
from slimrank.store import disk_error


def check_loadable(model: Any) -> None:
    """Make sure, before any work, that a compressed form of this model could be loaded again.

    Raises:
        ModelError: it has adapters, or its architecture is not one that transformers itself builds as a language model.
    """
    _check_adapters(model)
    config = getattr(model, "config", None)
    model_type = str(getattr(config, "model_type", ""))
    known = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else None  # noqa: SIM401 (its get() is not lazy)
    if known is None or type(config) is not known or type(model) not in native_classes(known):
        raise ModelError(
            f"{type(model).__name__} (model_type '{model_type}') is not a language model of transformers itself, "
            "so its compressed form could not be loaded again.",
            "AutoModelForCausalLM.from_pretrained without code of the model's own",
        )


def _check_adapters(model: Any) -> None:
    """Refuse a model with adapters: transformers would save these alone, and their layers are not compressed.

    Raises:
        ModelError: it has some.
    """
    found = [name for name, module in model.named_modules() if type(module).__module__.startswith("peft.")]
    if found or getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"the model has adapters (PEFT){f', the first at {found[0]!r}' if found and found[0] else ''}.",
            "model = model.merge_and_unload() before; if the folder holds a merged model, move adapter_config.json "
            "out of it",
        )


def replace_linears(
    model: nn.Module, members: Sequence[tuple[tuple[str, ...], Tensor]], A: Tensor, form: str = "pair"
) -> None:
    """Replace linear layers that share a factor A (usually a single one), cast once to the dtype of their weights.

    Args:
        model: changed in place.
        members: for each layer its path, followed by the paths of layers tied to it, and its factor B (out x rank).
        A: rank x in.
        form: what they are stored as; in one that shares nothing there is a single one.
    """
    before: CompressedLinear | None = None
    for paths, B in members:
        weight = model.get_submodule(paths[0]).get_parameter("weight")
        layer = layer_form(form).build(A, B, None, weight.dtype).to(weight.device)
        if before is not None:
            share_tensors(layer, before, layer.shared_names())
        before = layer
        for path in paths:
            _replace(model, path, layer)


def _replace(model: nn.Module, path: str, layer: CompressedLinear) -> None:
    """Put a layer of the same parameters there, with the bias that is there."""
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    old = parent.get_submodule(name)
    mine = copy.deepcopy(layer, {id(p): p for p in layer.parameters()})
    mine.set_bias(None if old.bias is None else old.bias.detach())  # type: ignore[operator]
    mine.requires_grad_(old.get_parameter("weight").requires_grad)
    setattr(parent, name, mine.train(old.training))


def mark_model(model: Any) -> None:
    """Make the model's configuration say how the model was changed, so that `save_pretrained` just works.

    A model with quantised weights and no other change stays one of its own architecture, which needs no slimrank, if
    transformers can read these weights.
    """
    found = found_transforms(model)
    for transform, entry in found:
        if transform.kind == QuantizedWeights.kind:
            model.config.quantization_config = quantization_config(entry["schemes"])
    keep_names(model)
    if [transform.kind for transform, _ in found] == [QuantizedWeights.kind] and read_by_others(found[0][1]["schemes"]):
        return
    about = described(found)
    mark_compressed(model.config, about)
    declare_ties(model, about["layers"])


def save_model(model: Any, tokenizer: Any, folder: Path, max_shard_size: str) -> list[str]:
    """Write weights, configuration, code, tokenizer and processor into an existing folder.

    Returns:
        Notes for the report.

    Raises:
        OutputError: the disk is full or cannot be written.
        ModelError: transformers refuses to write the model.
    """
    try:
        with saving("model"), _plain_generation(model):
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        notes = save_companions(model, tokenizer, folder)
        for path in folder.glob("*.safetensors"):  # written for their owner alone, unlike every other file
            path.chmod((folder / "config.json").stat().st_mode)
    except (OSError, SafetensorError) as error:
        raise disk_error(error, folder) from error
    return notes


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Give the model an empty generation configuration for a while: the true one is written by itself."""
    if getattr(model, "generation_config", None) is None:
        yield
        return
    true, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = true


def weight_bytes(folder: Path) -> int:
    """Count the bytes of all weight files in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
