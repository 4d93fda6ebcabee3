"""Folders that the repository of ASVD publishes: the native configuration with the ranks in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimrank.converting.layout import LAYOUTS, Described, Layout, Names, ranks_of


class Asvd(Layout):
    """`truncation_ranks` in a native configuration; ALinear is applied after BLinear, and has the bias."""

    id = "asvd"
    title = "ASVD"
    names = Names("BLinear.weight", "ALinear.weight", "ALinear.bias")

    def fits(self, config: Mapping[str, Any]) -> bool:
        """See `Layout.fits`."""
        return "truncation_ranks" in config

    def describe(self, config: Mapping[str, Any]) -> Described:
        """See `Layout.describe`."""
        native = {key: value for key, value in config.items() if key not in ("truncation_ranks", "architectures")}
        base = config.get("_name_or_path")
        return Described(
            config["model_type"], native, ranks_of(config["truncation_ranks"]), str(base) if _is_id(base) else None
        )


def _is_id(name: Any) -> bool:
    return isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/", "~"))


LAYOUTS.add(Asvd())
