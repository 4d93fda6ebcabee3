"""Sum statistics over processes, each of which has seen a part of the text.

Statistics are dataclasses of tensors and numbers, and layers may share some of them. What one process lacks, because no
token of its part reached a layer, counts as zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from slimrank.processes import Processes

T = TypeVar("T")
SETTINGS = {"shape", "needs", "rank"}  # fields that are the same everywhere
LARGEST = {"largest"}  # fields whose largest number counts, not the sum


@dataclass(frozen=True)
class _Same:
    """Stands for an object that also stands at another place."""

    place: str


@dataclass
class _Parts:
    """Statistics taken apart.

    Attributes:
        kinds: place -> class of the dataclass there, or where the same object stands.
        tensors: place -> tensor.
        values: place -> number, notes or setting; None where there is nothing.
    """

    kinds: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def add(self, place: str, value: Any, seen: dict[int, str]) -> None:
        """Take a value apart."""
        if isinstance(value, Tensor):
            self.tensors[place] = value
        elif not is_dataclass(value):
            self.values[place] = value
        elif id(value) in seen:
            self.kinds[place] = _Same(seen[id(value)])
        else:
            seen[id(value)], self.kinds[place] = place, type(value)
            for each in fields(value):
                self.add(f"{place}.{each.name}", getattr(value, each.name), seen)


def summed(processes: Processes, statistics: Mapping[str, T], device: torch.device) -> dict[str, T]:
    """Return the statistics of all processes, summed, by layer.

    Args:
        processes: all of them call this.
        statistics: module path -> statistics of this process's part of the text. Its tensors may be changed.
        device: where sums are made that this process lacks.
    """
    if processes.count == 1:
        return dict(statistics)
    parts, seen = _Parts(), dict[int, str]()
    for path, value in sorted(statistics.items()):
        parts.add(path, value, seen)
    others = processes.all((parts.kinds, {n: (t.shape, t.dtype) for n, t in parts.tensors.items()}, parts.values))
    whole = _Parts({name: kind for kinds, _, _ in others for name, kind in kinds.items()})
    specs = {name: spec for _, tensors, _ in others for name, spec in tensors.items()}
    for name, (shape, dtype) in sorted(specs.items()):
        mine = parts.tensors.get(name)
        mine = torch.zeros(shape, dtype=dtype, device=device) if mine is None else mine.contiguous()
        whole.tensors[name] = (processes.largest_ if _field(name) in LARGEST else processes.add_)(mine)
    for name in {name for _, _, values in others for name in values}:
        whole.values[name] = _together(_field(name), [values[name] for _, _, values in others if name in values])
    paths = {path: None for kinds, _, _ in others for path in kinds if _is_layer(path, kinds)}
    made: dict[str, Any] = {}
    return {path: _made(whole, path, made) for path in sorted(paths)}


def _is_layer(place: str, kinds: Mapping[str, Any]) -> bool:
    """Tell whether a place is a layer, and not a field of something."""
    return place.rpartition(".")[0] not in kinds


def _field(place: str) -> str:
    return place.rpartition(".")[2]


def _together(name: str, values: list[Any]) -> Any:
    """Join a value of several processes: numbers are added, notes listed once, settings are equal."""
    known = [value for value in values if value is not None]
    if not known or name in SETTINGS:
        return known[0] if known else None
    if isinstance(known[0], bool):
        return all(known)
    if isinstance(known[0], tuple):
        return tuple(dict.fromkeys(each for value in known for each in value))
    return sum(known)


def _made(parts: _Parts, place: str, made: dict[str, Any]) -> Any:
    """Put together what stands at a place; an object that stands at several is made once."""
    if place in made:
        return made[place]
    if place in parts.tensors:
        return parts.tensors[place]
    kind = parts.kinds.get(place)
    if kind is None:
        return parts.values[place]
    if isinstance(kind, _Same):
        made[place] = _made(parts, kind.place, made)
    else:
        made[place] = kind(**{each.name: _made(parts, f"{place}.{each.name}", made) for each in fields(kind)})
    return made[place]
