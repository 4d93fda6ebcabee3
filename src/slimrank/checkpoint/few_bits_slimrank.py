"""A warning of layers that another library rounds to too few bits. Copied into every saved model."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

from slimrank.layers.base import compressed_layers, held_by_others

# These fit the rounding to data, or cannot say how they rounded.
NOT_NEAREST = ("gptq", "awq", "auto-round", "aqlm", "vptq", "spqr", "quark", "bitnet", "compressed-tensors")
# How configurations of quantisers state the width of weights: HQQ and others, Quanto, torchao (two), bitsandbytes.
_WIDTH = re.compile(
    r'"(?:n|num_)?bits": (\d+)|"weights": "[a-z]+(\d+)|"weight_dtype": \{[^}]*"_data": "[a-z]+(\d+)'
    r'|(\d+)Weight\w*Config"|load_in_(\d)bit": true'
)


def warn_of_few_bits(model: Any) -> None:
    """Warn of a loaded model with layers that rounding to the nearest destroys, in the bits that it has."""
    config: Any = getattr(model.config, "quantization_config", None) or {}
    about = config if isinstance(config, Mapping) else config.to_dict()
    bits = nearest_bits(about)
    layers = compressed_layers(model).values()
    harmed = [layer for layer in layers if bits and bits < layer.least_nearest and held_by_others(layer)]
    if harmed:
        kinds = ", ".join(sorted({layer.kind for layer in harmed}))
        warnings.warn(
            f"{_method(about)} rounds {len(harmed)} layers of the kind '{kinds}' to the nearest in {bits} bits, which "
            "destroys them: they amplify rounding. Load the model in 8 bits, or compress it again with `slimrank "
            "compress --quantize int4-g64`, which makes up for the rounding.",
            stacklevel=4,
        )


def nearest_bits(about: Mapping[str, Any]) -> int | None:
    """Return the fewest bits that a configuration rounds weights to, each to the nearest; None where it does not say.

    Args:
        about: the `quantization_config`, as config.json holds it.
    """
    if _method(about) in NOT_NEAREST:
        return None
    found = _WIDTH.findall(json.dumps(about, default=str, skipkeys=True))
    return min((int("".join(groups)) for groups in found), default=None)


def _method(about: Mapping[str, Any]) -> str:
    method: Any = about.get("quant_method", "quantization_config")
    return str(getattr(method, "value", method))
