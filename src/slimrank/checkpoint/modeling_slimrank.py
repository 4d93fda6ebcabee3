"""Loader of compressed models. Copied into every saved model; imports nothing but torch and transformers.

A compressed model is an object of the native class (LlamaForCausalLM, ...) that some transforms have changed: linear
layers are compressed, experts are linear layers, layers are split (see `layers.transforms`). So `generate`,
`device_map`, PEFT and `save_pretrained` work as for any other model.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from slimrank.layers.transforms import saved_transforms

from .few_bits_slimrank import warn_of_few_bits


class SlimRankForCausalLM:
    """What `AutoModelForCausalLM` finds for a compressed model; it makes objects of the native class."""

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load a compressed model; arguments as for any `from_pretrained`.

        Raises:
            ValueError: factors are missing in the files; transformers would fill them with random numbers. Or the
                weights are to be quantised, and already are.
        """
        if config is None:
            from .configuration_slimrank import SlimRankConfig

            config = SlimRankConfig.from_pretrained(path)
        native, told = _native_class(config), kwargs.pop("output_loading_info", False)
        _check_unquantized(path, config, kwargs.get("quantization_config"))
        changed, quantization = _changed_class(native), _taken(config)
        model, info = changed.from_pretrained(path, *args, config=config, output_loading_info=True, **kwargs)
        _check_complete(path, info["missing_keys"], config.slimrank)
        model.__class__ = native
        for transform, entry in saved_transforms(config.slimrank):
            transform.loaded(model, entry)
        if quantization is not None:
            model.config.quantization_config = quantization
        warn_of_few_bits(model)
        keep_names(model)
        return (model, info) if told else model

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        native = _native_class(config)
        model = _changed_class(native)._from_config(config, **kwargs)
        model.__class__ = native
        keep_names(model)
        return model

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModelForCausalLM") -> None:
        """Do nothing: a compressed model always writes its own code files."""


def _taken(config: Any) -> Any:
    """Take what a configuration says of quantised weights out of it, where a transform reads these; else None."""
    return vars(config).pop("quantization_config", None) if _is_quantized(config) else None


def _is_quantized(config: Any) -> bool:
    return any(entry.get("kind") == "quantized" for entry in config.slimrank.get("transforms", ()))


def _check_unquantized(path: Any, config: Any, asked: Any) -> None:
    if asked is not None and _is_quantized(config):
        raise ValueError(
            f"slimrank has quantised the weights of '{path}' already, so quantization_config cannot be applied. "
            "Load the model without it, or compress the model again without --quantize and --bits."
        )


def _native_class(config: Any) -> Any:
    found = native_classes(type(config).__mro__[2])  # Compressed<Native>Config, CompressedConfig, <Native>Config, ...
    named = [native for native in found if native.__name__ in (config.architectures or ())]
    return (named or found)[0]


def native_classes(config_class: Any) -> list[Any]:
    """Return the classes that transformers builds of a configuration: language models, also those that read images."""
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    return [mapping[config_class] for mapping in mappings if config_class in mapping]


@functools.cache
def _changed_class(native: Any) -> Any:
    """Return a subclass of the native class whose constructor makes all transforms, for the time of loading."""

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        native.__init__(self, config, *args, **kwargs)
        for transform, entry in saved_transforms(config.slimrank):
            transform.apply(self, entry)

    return type(native.__name__, (native,), {"__init__": init, "__module__": native.__module__})


def _check_complete(path: Any, missing: Any, about: dict[str, Any]) -> None:
    needed = tuple(name for transform, entry in saved_transforms(about) for name in transform.needed(entry))
    lacking = sorted(name for name in missing if name.startswith(needed))
    if lacking:
        raise ValueError(
            f"'{path}' lacks {len(lacking)} weights of compressed layers, the first '{lacking[0]}'. "
            "Copy the folder again, or compress the model again."
        )


def keep_names(model: Any) -> None:
    """Have `save_pretrained` write weights under their names in the model.

    transformers writes those of the published checkpoint, by rules for the names of native layers, which do not find
    back from the names of factors.
    """
    model._weight_conversions = []
