"""Packed layers, as a change of the model. Copied into saved models that need it; imports nothing but torch.

Weights are saved under their names, so that everything that reads the folder finds them. Saved is which layers are
computed together, and which weights lie in memory by columns. Loading does both again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import nn

from slimrank.layers.base import CompressedLinear, compressed_layers
from slimrank.layers.packed import group_of, join, lie_by_columns, lie_by_rows, own_parts, part, reader
from slimrank.layers.transforms import Transform


class PackedLayers(Transform):
    """The layers that are computed together, and the parts whose weights lie by columns, by the name of their dtype."""

    kind: ClassVar[str] = "packed"
    order: ClassVar[int] = 200  # last: other changes give weights other memory

    def apply(self, model: nn.Module, entry: Mapping[str, Any]) -> None:
        """See `Transform.apply`.

        Raises:
            ValueError: layers that are not compressed, or cannot be computed together.
        """
        layers = compressed_layers(model)
        for paths in entry["groups"]:
            try:
                join([layers[path] for path in paths])
            except (KeyError, ValueError) as error:
                raise ValueError(
                    f"the layers {', '.join(paths)} of {type(model).__name__} cannot be computed together"
                ) from error
        _lay_out(layers, entry)

    def loaded(self, model: nn.Module, entry: Mapping[str, Any]) -> None:
        """Join the memory that the weights have now; layers that another library has changed stay alone."""
        layers = compressed_layers(model)
        for paths in entry["groups"]:
            group = [layers[path] for path in paths]
            for layer in group:
                part(layer)
            if all(reader(layer) is not None for layer in group):
                join(group)
        _lay_out(layers, entry)

    def undo(self, model: nn.Module) -> None:
        """Compute every layer by itself, from weights by rows."""
        unpack_layers(compressed_layers(model).values())

    def entry(self, model: nn.Module) -> dict[str, Any] | None:
        """See `Transform.entry`."""
        layers = compressed_layers(model)
        groups: dict[int, list[str]] = {}
        columns: dict[str, list[str]] = {}
        for path, layer in layers.items():
            if group := group_of(layer):
                groups.setdefault(id(group), []).append(path)
            for name, each in own_parts(layer):
                if not each.weight.is_contiguous():
                    columns.setdefault(_dtype(each), []).append(f"{path}.{name}")
        return {"groups": list(groups.values()), "columns": columns} if groups or columns else None


def unpack_layers(layers: Iterable[CompressedLinear]) -> None:
    """Compute every layer by itself, from weights by rows, in place."""
    for layer in layers:
        part(layer)
        for _, each in own_parts(layer):
            lie_by_rows(each)


def _lay_out(layers: Mapping[str, CompressedLinear], entry: Mapping[str, Any]) -> None:
    """Let weights of these dtypes lie by columns, where they are on a CPU: what is faster depends on both."""
    for path, layer in layers.items():
        for name, each in own_parts(layer):
            if f"{path}.{name}" in entry["columns"].get(_dtype(each), ()):
                lie_by_columns(each)


def _dtype(part: nn.Linear) -> str:
    return str(part.weight.dtype).removeprefix("torch.")
