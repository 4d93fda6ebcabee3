"""Room for the tensors of a layer while an engine reads them. Knows no engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.errors import ModelError
from slimrank.serving.compute import Maker, Packed, Shard
from slimrank.serving.plan import Stored
from slimrank.serving.sharding import Span, axis_of, cut, local

QUERY_KEY_VALUE = ("q", "k", "v")  # how engines number the layers that attention reads through


@dataclass
class _Slot:
    """Where the tensor of one shard is.

    Attributes:
        whole: its shape in the folder.
        axis: along which it is cut for this process.
        values: what was read; a view of the parameter that the engine knows.
        is_read: it was.
    """

    whole: tuple[int, ...]
    axis: int | None
    values: Tensor
    is_read: bool = False


@dataclass
class Slots:
    """The tensors of the layers that an engine holds as one, by name.

    All shards of one name are one parameter without a shape, since their ranks differ. The engine passes the number of
    the shard when it reads.

    Attributes:
        stored: the layers.
        spans: what this process holds of each.
        prefixes: what the names of each begin with; empty, except where slimrank has split a layer.
    """

    stored: Sequence[Stored]
    spans: Sequence[Span]
    prefixes: Sequence[str]
    _slots: dict[str, dict[int, _Slot]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The names of the parameters that were made."""
        return list(self._slots)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Make the parameters, by name, each with the function that reads into it, on torch's default device."""
        found: dict[str, list[tuple[int, Tensor, int | None]]] = {}
        for number, (layer, span, prefix) in enumerate(zip(self.stored, self.spans, self.prefixes, strict=True)):
            for name, like in layer.tensors.items():
                axis = axis_of(span.role, layer.kind, layer.side, name)
                found.setdefault(prefix + name, []).append((number, like, axis))
        return {name: self._parameter(name, tensors) for name, tensors in found.items()}

    def _parameter(self, name: str, tensors: Sequence[tuple[int, Tensor, int | None]]) -> nn.Parameter:
        shapes = [cut(like, axis, self.spans[number]).shape for number, like, axis in tensors]
        room = torch.empty(sum(shape.numel() for shape in shapes), dtype=tensors[0][1].dtype)
        places = room.split([shape.numel() for shape in shapes])
        slots = self._slots.setdefault(name, {})
        for (number, like, axis), place, shape in zip(tensors, places, shapes, strict=True):
            slots[number] = _Slot(tuple(like.shape), axis, place.view(shape))
        parameter: Any = nn.Parameter(room, requires_grad=False)
        parameter.weight_loader = self._reader(name)
        return parameter

    def _reader(self, name: str) -> Callable[..., None]:
        def read(parameter: nn.Parameter, values: Tensor, shard: Any = None) -> None:
            self.read(name, values, shard)

        return read

    def read(self, name: str, values: Tensor, shard: Any = None) -> None:
        """Read a tensor of the folder.

        Args:
            name: with the prefix.
            values: of the whole layer.
            shard: which of the layers, as engines say it: q, k, v, a number, or None for the only one.

        Raises:
            ModelError: it has another shape, or no layer of that number has such a tensor.
        """
        slots = self._slots[name]
        number = QUERY_KEY_VALUE.index(shard) if shard in QUERY_KEY_VALUE else shard
        slot = next(iter(slots.values())) if number is None and len(slots) == 1 else slots.get(number)
        if slot is None or slot.whole != tuple(values.shape):
            wanted = "none" if slot is None else slot.whole
            raise ModelError(
                f"'{name}' of '{self.stored[0].path}' (shard {shard}) is {tuple(values.shape)}; expected is {wanted}.",
                "copy the folder again, or compress the model again",
            )
        span = self.spans[next(n for n, other in slots.items() if other is slot)]
        slot.values.copy_(cut(values, slot.axis, span))
        slot.is_read = True

    def shards(self, lent: Mapping[str, Tensor]) -> list[Shard]:
        """Return the layers that were read, cut for this process.

        Args:
            lent: path -> the factor A of a layer that others use; those of this one are added.

        Raises:
            ModelError: tensors were not read.
        """
        missing = [f"{name} ({n})" for name, slots in self._slots.items() for n, s in slots.items() if not s.is_read]
        if missing:
            raise ModelError(
                f"the folder lacks {len(missing)} tensors of '{self.stored[0].path}', the first '{missing[0]}'.",
                "copy the folder again, or compress the model again",
            )
        known, found = dict(lent), []
        for number, (layer, span, prefix) in enumerate(zip(self.stored, self.spans, self.prefixes, strict=True)):
            values = {name: self._slots[prefix + name][number].values for name in layer.tensors}
            matrices = layer.matrices(values)
            for name in set(matrices) - set(values):  # those of few bits were read whole
                matrices[name] = cut(matrices[name], axis_of(span.role, layer.kind, layer.side, name), span)
            if layer.share:
                matrices["A.weight"] = known[layer.share]
            kind, matrices = local(layer.kind, layer.side, matrices, span)
            known[layer.path] = matrices.get("A.weight", torch.empty(0))
            found.append(Shard(kind, layer.side, matrices))
        return found

    def packed(self, lent: dict[str, Tensor], lenders: set[str], make: Maker) -> Packed:
        """Return the module that computes the layers, and lend the factors A that others use."""
        shards = self.shards(lent)
        for layer, shard in zip(self.stored, shards, strict=True):
            if layer.path in lenders:
                lent[layer.path] = shard.matrices["A.weight"]
        return Packed(shards, make)
