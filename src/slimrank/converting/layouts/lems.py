"""Folders that the repository of LEMS publishes: a wrapper around the native model, with the ranks beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimrank.converting.layout import LAYOUTS, Described, Layout, Names, ranks_of


class Lems(Layout):
    """`model_type: low_rank_compressed`; the native configuration is inside, and `rank_dict` has the ranks."""

    id = "lems"
    title = "LEMS"
    # Its layers have a placeholder for code that asks for a weight; saving may have kept it under both of its names.
    names = Names("mod_a.weight", "mod_b.weight", "bias", ("weight", "dummy_weight"))
    prefix = "wrapped_model."

    def fits(self, config: Mapping[str, Any]) -> bool:
        """See `Layout.fits`."""
        return config.get("model_type") == "low_rank_compressed"

    def describe(self, config: Mapping[str, Any]) -> Described:
        """See `Layout.describe`."""
        base = config.get("base_model_id")
        facts = {name: config[name] for name in ("compression_method", "target_ratio") if config.get(name)}
        return Described(
            config["base_model_type"],
            config["base_config"],
            ranks_of(config["rank_dict"]),
            None if base in (None, "", "unknown") else str(base),
            facts,
        )


LAYOUTS.add(Lems())
