"""What config.json says of quantised weights: that of the library compressed-tensors, which others read, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimrank.linalg.scheme import Scheme

METHOD, FORMAT = "compressed-tensors", "pack-quantized"


def quantization_config(schemes: Mapping[str, str]) -> dict[str, Any]:
    """Return the configuration of layers, one group for each scheme.

    Args:
        schemes: path of a linear layer -> its scheme, as it is written.
    """
    groups: dict[str, list[str]] = {}
    for path, scheme in schemes.items():
        groups.setdefault(scheme, []).append(path)
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {"targets": paths, "weights": _weights(Scheme.parse(scheme))}
            for number, (scheme, paths) in enumerate(groups.items())
        },
        "ignore": [],
    }


def read_by_others(schemes: Mapping[str, str]) -> bool:
    """Tell whether transformers reads such layers: up to compressed-tensors 0.20, only those without zero points."""
    return all(Scheme.parse(scheme).symmetric for scheme in schemes.values())


def _weights(scheme: Scheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group else "channel",
        "group_size": scheme.group,
        "dynamic": False,
    }
