"""Read from its configuration what a model is; refuse all but decoder language models of transformers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING, MODEL_MAPPING

from slimrank.checkpoint.configuration_slimrank import MODEL_TYPE
from slimrank.checkpoint.modeling_slimrank import SlimRankForCausalLM, native_classes
from slimrank.checkpoint.processor import find_file
from slimrank.errors import ModelError
from slimrank.models.explained import DAMAGED, explained
from slimrank.models.files import ADAPTER
from slimrank.models.quantised import check_quantisation
from slimrank.models.text_alone import check_text_alone, reads_images

_DECODERS = "give a decoder language model, such as Llama, Qwen, Gemma or GPT-2"
_SWITCHED = ("bert-generation",)  # encoders with the switch `is_decoder`, beside those that fill masks
_COMPUTED = {"attention": (None, "eager", "sdpa"), "experts": (None, "eager", "grouped_mm", "batched_mm")}


@dataclass
class Kind:
    """What a configuration says about a model.

    Attributes:
        config: of the class that is built; that of the text part, where it is a class for text alone.
        model_class: the class of transformers; for a model that slimrank saved, what loads it.
        widened: the quantisation that loading turns into dense weights, if any.
        notes: deviations from the configuration.
    """

    config: Any
    model_class: Any
    widened: str | None = None
    notes: list[str] = field(default_factory=list)


def kind_of(spec: str | Path, place: Mapping[str, Any]) -> Kind:
    """Read the configuration of a model and decide how it is loaded.

    Args:
        spec: the model, as the user named it.
        place: `pretrained_model_name_or_path`, and `gguf_file` for a GGUF file.

    Raises:
        ModelError: it cannot be read, or is not a dense decoder language model of transformers itself.
    """
    content: dict[str, Any] = {}
    gguf = "gguf_file" in place
    if not gguf:
        _refuse_adapter(spec, str(place["pretrained_model_name_or_path"]))
        content = _content(spec, place)
        _refuse_custom_code(spec, content)
    ours = content.get("model_type") == MODEL_TYPE  # its layers of few bits unpack themselves
    widened = "GGUF" if gguf else None if ours else check_quantisation(spec, content)
    with explained(spec):
        config = AutoConfig.from_pretrained(**place, trust_remote_code=False)
        check_decoder(f"the model '{spec}'", config)
        kind = Kind(config, _class_of(spec, config, content), widened)
        _take_text_part(kind)
        _compute_plainly(kind)
        if reads_images(kind.model_class):
            check_text_alone(kind.model_class, kind.config)
    return kind


def _content(spec: str | Path, place: Mapping[str, Any]) -> dict[str, Any]:
    """Read config.json."""
    with explained(spec):
        try:
            content, _ = PreTrainedConfig.get_config_dict(**place)
        except TypeError:  # transformers 5.0 fails on a list itself
            content = None
    if not isinstance(content, dict):
        raise ModelError(f"the model '{spec}' cannot be loaded: its config.json holds no JSON object.", DAMAGED)
    return content


def _refuse_adapter(spec: str | Path, source: str) -> None:
    if find_file(source, ADAPTER) is None:
        return
    if find_file(source, "config.json") is None:
        raise ModelError(
            f"'{spec}' is an adapter (LoRA), not a model.",
            "merge it into its model (merge_and_unload of PEFT) and save the result to another folder",
        )
    raise ModelError(
        f"'{spec}' holds a model and an adapter ({ADAPTER}); slimrank does not know whether they are merged.",
        f"if they are merged, move {ADAPTER} and adapter_model.* elsewhere; else merge it and save to another folder",
    )


def _refuse_custom_code(spec: str | Path, content: Mapping[str, Any]) -> None:
    """Refuse code in the model's files, unless transformers has the architecture itself."""
    auto_map = content.get("auto_map")
    if not auto_map or content.get("model_type") == MODEL_TYPE:
        return
    named = list(content.get("architectures") or [])
    if content.get("model_type") in CONFIG_MAPPING and set(map(str.lower, named)) <= _names_of_transformers():
        return
    raise ModelError(
        f"the model '{spec}' ({', '.join(named) or content.get('model_type')}) needs custom code, which "
        "slimrank never runs.",
        "use a model that transformers itself supports, or a newer transformers",
    )


@functools.cache
def _names_of_transformers() -> frozenset[str]:
    """List the class names of transformers in lower case: the MPTForCausalLM of the hub is MptForCausalLM there."""
    return frozenset(name.lower() for name in dir(transformers))


def check_decoder(what: str, config: Any) -> None:
    """Refuse encoders and encoder-decoders.

    Args:
        what: the model, in words.
        config: its configuration.

    Raises:
        ModelError: it is one of these.
    """
    name = f"{what} (model_type '{config.model_type}')"
    parts = [part for part in (config, *(getattr(config, key, None) for key in ("text_config", "decoder"))) if part]
    if any(getattr(part, "is_encoder_decoder", False) is True for part in parts):
        raise ModelError(f"{name} is an encoder-decoder; slimrank compresses decoders.", _DECODERS)
    if any(map(_sees_what_follows, parts)):
        raise ModelError(
            f"{name} is an encoder: its tokens see later ones, so it does not predict the next one.", _DECODERS
        )


def _sees_what_follows(config: Any) -> bool:
    fills_masks = type(config) in MODEL_FOR_MASKED_LM_MAPPING or getattr(config, "model_type", "") in _SWITCHED
    if fills_masks and not getattr(config, "is_decoder", getattr(config, "causal", False)):
        return True
    both_ways = (
        getattr(config, "use_bidirectional_attention", False) is True or getattr(config, "attn_type", "") == "bi"
    )
    return both_ways or getattr(config, "is_causal", True) is False


def _class_of(spec: str | Path, config: Any, content: Mapping[str, Any]) -> Any:
    """Choose the class that the configuration names, or else one made for this very configuration."""
    if content.get("model_type") == MODEL_TYPE:
        return SlimRankForCausalLM
    native, named = native_classes(type(config)), list(content.get("architectures") or [])
    what = f"the model '{spec}' ({', '.join(named) or type(config).__name__})"
    if not native:
        raise ModelError(f"{what} is not a language model.", _DECODERS)
    chosen = [each for each in native if each.__name__.lower() in map(str.lower, named)]
    if not chosen and named:
        _refuse_other_tasks(what, config, named)
    exact = [each for each in native if each.config_class is type(config)]
    return (chosen or exact or native)[0]


def _refuse_other_tasks(what: str, config: Any, named: list[str]) -> None:
    """Refuse classes of transformers that are neither a language model nor the bare decoder of one."""
    bare = MODEL_MAPPING.get(type(config), None)
    allowed = {each.__name__ for each in (bare if isinstance(bare, tuple) else (bare,)) if each is not None}
    if any(hasattr(transformers, name) and name not in allowed for name in named):
        raise ModelError(
            f"{what} is a model of another task (a classifier, for example); its head would be lost.",
            "use the language model that it was made from",
        )


def _take_text_part(kind: Kind) -> None:
    """Give a class for text alone the text part of a configuration, as the auto classes of transformers do."""
    text = getattr(type(kind.config), "sub_configs", {}).get("text_config")
    if text is not None and getattr(kind.model_class, "config_class", None) is text:
        about = getattr(kind.config, "quantization_config", None)
        kind.config = kind.config.get_text_config()
        if about is not None:
            kind.config.quantization_config = about


def _compute_plainly(kind: Kind) -> None:
    """Compute with PyTorch alone, where the configuration asks for kernels of other packages."""
    for what, known in _COMPUTED.items():
        name = f"_{what}_implementation" if what == "experts" else "_attn_implementation"
        asked = getattr(kind.config, name, None)
        if isinstance(asked, str) and asked not in known:
            setattr(kind.config, name, None)
            kind.notes.append(f"config.json asks for {what} by '{asked}'; PyTorch's own is used")
