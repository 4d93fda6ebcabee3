"""Store the statistics of all blocks, so that other methods on the same text need not run the model again.

There is one file for each block and kind of statistics, holding the sums in float64. A method finds the kinds that it
needs, whichever method gathered them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slimrank.statistics.accumulators import ChannelSums, GramSum
from slimrank.statistics.catalogue import NEEDS, GatherOptions, Need
from slimrank.statistics.layer_statistics import LayerStatistics
from slimrank.store import Store

KINDS: dict[Need, tuple[str, ...]] = {
    "column": ("inputs", "outputs", "input_energies"),
    "gram": ("inputs",),
    "channels": ("channels",),
    "row": ("gradients", "pulled", "gradient_energies"),
    "weight_squares": ("weight_squares",),
}
SUMS: dict[str, Any] = {"gram": GramSum, "channels": ChannelSums}


class StatisticsCache:
    """The stored statistics of a text.

    Args:
        store: under a key of everything that statistics depend on, except how they are gathered.
        blocks: blocks of the model.
        device: the device that sums are loaded to.
    """

    def __init__(self, store: Store, blocks: int, device: torch.device) -> None:
        self.store, self.blocks, self.device = store, blocks, device

    def save(
        self,
        index: int,
        statistics: Mapping[str, LayerStatistics],
        leaders: Mapping[str, str],
        gathering: GatherOptions,
    ) -> None:
        """Store the statistics of a block; nothing for methods whose statistics depend on ranks."""
        if "projectors" in gathering.needs:
            return
        for need in gathering.needs & KINDS.keys():
            packed = _Packed(KINDS[need])
            layers = {path: packed.layer(path, mine) for path, mine in statistics.items()}
            about = {"layers": layers, "leaders": dict(leaders)}
            self.store.save(_name(index, need, gathering), packed.tensors, about)

    def load(
        self, index: int, sources: Sequence[Need], gathering: GatherOptions, ranks: Mapping[str, int]
    ) -> tuple[dict[str, LayerStatistics], dict[str, str]]:
        """Load the statistics of a block's layers, of the kinds in `sources`, and which layers share an input."""
        found: dict[str, LayerStatistics] = {}
        leaders: dict[str, str] = {}
        for source in sources:
            tensors, about = self.store.load(_name(index, source, gathering), str(self.device))
            shared: dict[str, Any] = {}
            leaders |= about["leaders"]
            for path, mine in about["layers"].items():
                fresh = LayerStatistics(tuple(mine["shape"]), gathering.needs, rank=ranks.get(path))
                layer = found.setdefault(path, fresh)
                layer.tokens, layer.notes = mine["tokens"], tuple(dict.fromkeys((*layer.notes, *mine["notes"])))
                for name, value in mine["values"].items():
                    setattr(layer, name, _unpacked(value, tensors, shared))
        return found, leaders

    def sources(self, gathering: GatherOptions) -> list[Need] | None:
        """Return the stored kinds that cover what a method gathers, for all blocks; None if some are missing.

        A whole gram also serves as a column's.
        """
        wanted = {need for need in gathering.needs if NEEDS[need].takes != "none"}
        if not wanted or not wanted <= KINDS.keys():
            return None
        chosen: list[Need] = []
        for need in sorted(wanted):
            candidates: list[Need] = ["column", "gram"] if need == "column" else [need]
            complete = [c for c in candidates if self._complete(c, gathering)]
            if not complete:
                return None
            chosen.append(complete[0])
        return chosen

    def _complete(self, need: Need, gathering: GatherOptions) -> bool:
        return all(self.store.has(_name(index, need, gathering)) for index in range(self.blocks))


def _name(index: int, need: Need, gathering: GatherOptions) -> str:
    """Name the file of a block, kind and the settings that steer it."""
    settings = "".join(f"-{getattr(gathering, name)}" for name in NEEDS[need].settings)
    return f"{need}{settings}-{index:04d}".replace(" ", "")


class _Packed:
    """The fields of layers for JSON, without tensors; sums that layers share are stored once."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.tensors: dict[str, Tensor] = {}
        self._sums: dict[int, dict[str, Any]] = {}

    def layer(self, path: str, layer: LayerStatistics) -> dict[str, Any]:
        values = {name: self._value(f"{path}.{name}", getattr(layer, name)) for name in self.names}
        return {"shape": layer.shape, "tokens": layer.tokens, "notes": layer.notes, "values": values}

    def _value(self, place: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            self.tensors[place] = value
            return {"tensor": place}
        if not isinstance(value, (GramSum, ChannelSums)):
            return value
        if id(value) not in self._sums:
            kind = next(kind for kind, sums in SUMS.items() if isinstance(value, sums))
            parts = [part for part in vars(value) if part != "count"]
            self.tensors |= {f"{place}.{part}": getattr(value, part) for part in parts}
            self._sums[id(value)] = {"sums": kind, "at": place, "parts": parts, "count": value.count}
        return self._sums[id(value)]


def _unpacked(value: Any, tensors: Mapping[str, Tensor], shared: dict[str, Any]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if value["at"] not in shared:
        parts = {part: tensors[f"{value['at']}.{part}"] for part in value["parts"]}
        shared[value["at"]] = SUMS[value["sums"]](**parts, count=value["count"])
    return shared[value["at"]]
