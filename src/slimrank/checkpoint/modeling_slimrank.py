"""Loader of compressed models. Copied into every saved model; imports nothing but torch and transformers.

A compressed model is an object of the native class (LlamaForCausalLM, ...), with some linear layers replaced by
`LowRankLinear` or `PivotLinear`, fused experts by `Experts`, and split layers by `SplitLinear`. So `generate`,
`device_map`, PEFT and `save_pretrained` work as for any other model.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from slimrank.layers.experts import as_linears
from slimrank.layers.low_rank import LowRankLinear
from slimrank.layers.pivot import PivotLinear
from slimrank.layers.split import SplitLinear


class SlimRankForCausalLM:
    """What `AutoModelForCausalLM` finds for a compressed model; it makes objects of the native class."""

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load a compressed model; arguments as for any `from_pretrained`.

        Raises:
            ValueError: factors are missing in the files; transformers would fill them with random numbers.
        """
        if config is None:
            from .configuration_slimrank import SlimRankConfig

            config = SlimRankConfig.from_pretrained(path)
        native, told = _native_class(config), kwargs.pop("output_loading_info", False)
        thin = _class_with_thin_layers(native)
        model, info = thin.from_pretrained(path, *args, config=config, output_loading_info=True, **kwargs)
        _check_complete(path, info["missing_keys"], config.slimrank["layers"])
        model.__class__ = native
        keep_names(model)
        return (model, info) if told else model

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        native = _native_class(config)
        model = _class_with_thin_layers(native)._from_config(config, **kwargs)
        model.__class__ = native
        keep_names(model)
        return model

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModelForCausalLM") -> None:
        """Nothing to do: a compressed model always writes its own code files."""


def _native_class(config: Any) -> Any:
    found = native_classes(type(config).__mro__[2])  # Compressed<Native>Config, CompressedConfig, <Native>Config, ...
    named = [native for native in found if native.__name__ in (config.architectures or ())]
    return (named or found)[0]


def native_classes(config_class: Any) -> list[Any]:
    """The classes that transformers builds of a configuration: language models, also those that read images."""
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    return [mapping[config_class] for mapping in mappings if config_class in mapping]


@functools.cache
def _class_with_thin_layers(native: Any) -> Any:
    """A subclass of the native class whose constructor puts in the low-rank layers, for the time of loading."""

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        native.__init__(self, config, *args, **kwargs)
        for path in config.slimrank.get("experts", ()):
            self.set_submodule(path, as_linears(self.get_submodule(path)))
        for path, sizes in config.slimrank.get("split", {}).items():
            self.set_submodule(path, SplitLinear(self.get_submodule(path), sizes))
        replace_layers(self, config.slimrank["layers"])

    return type(native.__name__, (native,), {"__init__": init, "__module__": native.__module__})


def replace_layers(model: nn.Module, layers: dict[str, dict[str, Any]]) -> None:
    """Put an empty `LowRankLinear` or `PivotLinear` in the place of each named layer.

    Raises:
        ValueError: a layer that the model lacks: the checkpoint and the architecture do not belong together.
    """
    for path, about in layers.items():
        parent_path, _, name = path.rpartition(".")
        try:
            parent = model.get_submodule(parent_path)
            old = parent.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"the compressed layer '{path}' is not in {type(model).__name__}") from error
        weight: torch.Tensor = old.weight  # type: ignore[assignment]
        setattr(parent, name, _empty_layer(about, device=weight.device, dtype=weight.dtype))
    declare_ties(model, layers)


def _empty_layer(about: dict[str, Any], **place: Any) -> nn.Module:
    shape = about["in"], about["out"], about["rank"], about["bias"]
    return PivotLinear(*shape, about["side"], **place) if "side" in about else LowRankLinear(*shape, **place)


def _parts(about: dict[str, Any]) -> tuple[str, str]:
    return ("skeleton", "interpolation") if "side" in about else ("A", "B")


def _check_complete(path: Any, missing: Any, layers: dict[str, Any]) -> None:
    lacking = sorted(name for name in missing if name.startswith(tuple(f"{layer}." for layer in layers)))
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


def declare_ties(model: Any, layers: dict[str, dict[str, Any]]) -> None:
    """Tell transformers which factors are one tensor, so that it saves them once and ties them after loading."""
    ties = {
        f"{path}.{factor}.weight": f"{about[kind]}.{factor}.weight"
        for path, about in layers.items()
        for kind, factors in (("tie", _parts(about)), ("share", ("A",)))
        if kind in about
        for factor in factors
    }
    if ties:
        declared = {
            k: v for k, v in dict(model._tied_weights_keys or {}).items() if k.removesuffix(".weight") not in layers
        }
        model._tied_weights_keys = {**declared, **ties}
        model.all_tied_weights_keys = {**declared, **ties} if model.config.tie_word_embeddings else ties
