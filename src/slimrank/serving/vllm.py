"""The plug-in for vLLM: folders of slimrank load as models of vLLM's own classes.

vLLM calls `register` in each of its processes. A folder's configuration becomes that of the native architecture, with a
"quantisation" called slimrank. So vLLM builds its own model, and asks `serving.vllm_layers` for every linear layer.
"""

from __future__ import annotations

import warnings
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from packaging.version import Version

from slimrank.errors import MissingExtraError, ModelError

METHOD = "slimrank"
LEAST = Version("0.32.0")  # the first one that this was run with
# Architectures whose tokens were compared with those of transformers. Others may store weights in another order, which
# their loaders undo for dense weights only. For those in BY_TRANSFORMERS vLLM has no class of its own: it takes that of
# transformers, with its own linear layers and attention, which is slower.
BY_TRANSFORMERS = ("glm", "olmo2", "smollm3", "starcoder2")
TRIED = ("cohere", "gemma", "gemma3_text", "granite", "llama", "mistral", "phi3", "qwen2", "qwen3", *BY_TRANSFORMERS)


def register() -> None:
    """Tell vLLM about slimrank; called by vLLM (entry point `vllm.general_plugins`), any number of times.

    An older vLLM goes on with other models, and refuses folders of slimrank by itself.
    """
    import slimrank  # noqa: F401  # so that transformers knows the folders

    problem = engine_problem()
    if problem:
        warnings.warn(f"{problem}, so vLLM cannot load folders of slimrank.", stacklevel=2)
        return
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.transformers_utils import config

    from slimrank.serving.vllm_config import SlimRankConfigParser
    from slimrank.serving.vllm_layers import SlimRankQuantization

    # Without `register_config_parser`, which warns each time that a known format gets another reader.
    config._CONFIG_FORMAT_TO_CONFIG_PARSER["hf"] = SlimRankConfigParser
    register_quantization_config(METHOD)(SlimRankQuantization)


def engine_problem() -> str | None:
    """Say why vLLM cannot serve folders of slimrank here; None if it can."""
    if find_spec("vllm") is None:
        return "vLLM is not installed"
    import vllm

    found = Version(vllm.__version__)
    return None if Version(found.base_version) >= LEAST else f"vLLM {found} is too old; at least {LEAST} is needed"


def need_engine() -> None:
    """Make sure that vLLM can serve folders of slimrank.

    Raises:
        MissingExtraError: it is not installed.
        ModelError: it is too old, or does not know slimrank.
    """
    if find_spec("vllm") is None:
        raise MissingExtraError("vllm", "vllm", "serving with vLLM")
    problem = engine_problem()
    if problem:
        raise ModelError(f"{problem}.", f"pip install 'vllm>={LEAST}'")
    names = {point.name for point in metadata.entry_points(group="vllm.general_plugins")}
    if METHOD not in names:
        raise ModelError("vLLM does not see the plug-in of slimrank.", "pip install --force-reinstall slimrank")


def served_config(config: Any) -> Any:
    """Return the native configuration of a compressed model, with what slimrank did as its quantisation.

    Args:
        config: what `AutoConfig` gives for the folder.

    Raises:
        ModelError: vLLM cannot take a form, or the architecture was not tried.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from slimrank.serving.plan import ELSEWHERE, ServedPlan

    about: dict[str, Any] = config.slimrank
    family = about["base_model_type"]
    if family not in TRIED:
        raise ModelError(
            f"compressed models of the architecture '{family}' were not tried with vLLM, which may keep their weights "
            f"in another order. Tried are {', '.join(TRIED)}.",
            ELSEWHERE,
        )
    ServedPlan.read(about)
    fields = {key: value for key, value in config.to_dict().items() if key not in ("slimrank", "auto_map")}
    fields["quantization_config"] = {"quant_method": METHOD, "slimrank": about}
    native = CONFIG_MAPPING[family].from_dict(fields)
    native.name_or_path = config.name_or_path
    return native
