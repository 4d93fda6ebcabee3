"""Configuration of a compressed model. Copied into every saved model; imports only transformers.

On disk, config.json has `model_type: slimrank`, so that a transformers that knows nothing of slimrank refuses
the model instead of filling it with random weights. The configuration of the original architecture lies inside,
under `base_config`. In memory it is the other way round: an object of (a subclass of) the native configuration
class, with its native `model_type`, that carries the ranks in its attribute `slimrank`.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

MODEL_TYPE = "slimrank"
FORMAT = 5  # 1 knows pairs, 2 pivot layers, 3 experts, 4 split layers, 5 all kinds; written is the least that is enough
AUTO_MAP = {
    "AutoConfig": "configuration_slimrank.SlimRankConfig",
    "AutoModelForCausalLM": "modeling_slimrank.SlimRankForCausalLM",
}
BESIDE = ("quantization_config",)  # keys that others write or look for at the top of config.json, not in the base's
# A native class asked to load the folder (LlamaForCausalLM.from_pretrained) would only warn about the model_type and
# fill a default-sized model with random weights. This text in fields that it must read makes it stop, and says why.
REFUSAL = "compressed by slimrank: load it with AutoModelForCausalLM after `import slimrank`, or trust_remote_code=True"


class SlimRankConfig(PreTrainedConfig):
    """What `AutoConfig` finds for `model_type: slimrank`; reading it gives a native configuration."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the native configuration (a `CompressedConfig` of the base architecture) out of config.json.

        Raises:
            ValueError: the file was written by a newer slimrank, or lacks what slimrank writes.
        """
        flat = flatten(config_dict)
        native = compressed_config_class(flat["slimrank"]["base_model_type"])
        return native.from_dict(flat, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Do nothing: a compressed model always writes its own code files."""


def flatten(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the native configuration, and those of slimrank, out of config.json.

    Raises:
        ValueError: the file was written by a newer slimrank, or lacks what slimrank writes.
    """
    about = config_dict.get("slimrank")
    if not isinstance(about, dict) or "base_config" not in config_dict:
        raise ValueError("config.json says model_type 'slimrank' but lacks 'slimrank' or 'base_config'")
    if about["format"] > FORMAT:
        raise ValueError(
            f"the model was saved in slimrank format {about['format']}; this slimrank reads up to {FORMAT}: "
            "upgrade slimrank"
        )
    beside = {key: config_dict[key] for key in BESIDE if key in config_dict}
    return {**config_dict["base_config"], **beside, "slimrank": about, "auto_map": AUTO_MAP}


class CompressedConfig:
    """Mixed into the native configuration class: reads and writes config.json the way this file describes."""

    slimrank: dict[str, Any]

    @classmethod
    def get_config_dict(cls, path: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read config.json (for code that asks the class of a loaded configuration, as PEFT does)."""
        config_dict, rest = super().get_config_dict(path, **kwargs)  # type: ignore[misc]
        return (flatten(config_dict) if "base_config" in config_dict else config_dict), rest

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write config.json in the slimrank format."""
        base = json.loads(self.to_json_string(use_diff=use_diff))  # type: ignore[attr-defined]
        about = base.pop("slimrank")
        for key in ("model_type", "auto_map"):
            base.pop(key, None)
        beside = {key: base.pop(key) for key in BESIDE if key in base}
        content = {
            "model_type": MODEL_TYPE,
            "architectures": ["SlimRankForCausalLM"],
            "auto_map": AUTO_MAP,
            **dict.fromkeys(("vocab_size", "text_config"), REFUSAL),
            "dtype": base.get("dtype"),
            "transformers_version": base.get("transformers_version"),
            **beside,
            "slimrank": about,
            "base_config": base,
        }
        Path(json_file_path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write config.json, and beside it the code that `trust_remote_code=True` runs."""
        from .code_slimrank import code_of, copy_code

        Path(save_directory).mkdir(parents=True, exist_ok=True)
        copy_code(Path(save_directory), code_of(self.slimrank))
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)  # type: ignore[misc]

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (self.slimrank["base_model_type"], vars(self))


def _unpickle(base_model_type: str, state: dict[str, Any]) -> Any:
    config_class = compressed_config_class(base_model_type)
    config = config_class.__new__(config_class)
    vars(config).update(state)
    return config


@functools.cache
def compressed_config_class(base_model_type: str) -> Any:
    """Return the native configuration class of that model type, with `CompressedConfig` mixed in.

    Raises:
        ValueError: this version of transformers does not know the architecture.
    """
    # Inside the function: slimrank registers this very module as soon as the auto classes are imported.
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from .modeling_slimrank import SlimRankForCausalLM

    if base_model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"the model was compressed from the architecture '{base_model_type}', which this version of transformers "
            "does not know: upgrade transformers"
        )
    native = CONFIG_MAPPING[base_model_type]
    mixed = type(f"Compressed{native.__name__}", (CompressedConfig, native), {"__module__": __name__})
    # The class exists only now, so the auto classes are told only now where such configurations lead. Older versions of
    # transformers ask a model's class for its `config_class`.
    loader = type(SlimRankForCausalLM.__name__, (SlimRankForCausalLM,), {"config_class": mixed})
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        auto.register(mixed, loader, exist_ok=True)
    return mixed


def mark_compressed(config: Any, about: dict[str, Any]) -> None:
    """Turn a native configuration, in place, into one that tells how a compressed model was changed.

    Args:
        config: the `config` of a model; every submodule that holds it sees the change.
        about: see `layers.transforms.described`.
    """
    config.slimrank = {"format": about["format"], "base_model_type": config.model_type, **about}
    config.auto_map = AUTO_MAP
    config.__class__ = compressed_config_class(config.model_type)
