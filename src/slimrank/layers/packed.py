"""Layers of one input that are computed together: one product for all that reads the inputs.

Copied into saved models that need it; imports nothing but torch. The layers stay where they are, with their parameters
under their names. Only the memory of what reads the inputs is joined, and the first layer that is called computes the
outputs of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from slimrank.layers.base import CompressedLinear, is_plain
from slimrank.layers.low_rank import LowRankLinear
from slimrank.layers.pivot import PivotLinear, by_columns


class PackedGroup:
    """Computes several layers of the same inputs at once.

    Args:
        layers: see `reader`; their readers get joint memory.
    """

    def __init__(self, layers: Sequence[CompressedLinear]) -> None:
        self.layers = list(layers)
        self.readers: list[nn.Linear] = [part for layer in layers if (part := reader(layer)) is not None]
        self.joint = torch.cat([part.weight.data for part in self.readers])
        self.starts: list[int] = []
        for part in self.readers:
            self.starts.append(sum(len(each.weight) for each in self.readers[: len(self.starts)]))
            part.weight.data = self.joint.narrow(0, self.starts[-1], len(part.weight))
        self.order = _joint_order(self.layers, self.starts, self.joint)
        self._orders = _orders(self.layers)
        self._input: Tensor | None = None
        self._outputs: list[Tensor | None] = []

    def output(self, number: int, x: Tensor) -> Tensor:
        """Return the outputs of one of the layers for inputs x (..., in)."""
        if x is not self._input or self._outputs[number] is None:
            if self._learns() or not self._whole():
                return type(self.layers[number]).forward(self.layers[number], x)
            self._input, self._outputs = x, list(self._computed(x))
        found, self._outputs[number] = self._outputs[number], None
        if not any(output is not None for output in self._outputs):
            self._input = None
        assert found is not None
        return found

    def _learns(self) -> bool:
        """Tell whether gradients of the weights are wanted, or a compiler looks on, which joins products itself."""
        trained = torch.is_grad_enabled() and any(part.weight.requires_grad for part in self.readers)
        return trained or torch.compiler.is_compiling()

    def _whole(self) -> bool:
        """Tell whether all is as it was joined: `model.to` gives weights other memory, and others may change parts."""
        size = self.joint.element_size() * self.joint.shape[1]
        first = self.joint.data_ptr()
        return self._orders == _orders(self.layers) and all(
            reader(layer) is part
            and part.weight.data_ptr() == first + start * size
            and part.weight.dtype == self.joint.dtype
            for layer, part, start in zip(self.layers, self.readers, self.starts, strict=True)
        )

    def _computed(self, x: Tensor) -> Iterable[Tensor]:
        if self.order is None:
            z = linear(x, self.joint)
            return [_others(layer, z.narrow(-1, *rows)) for layer, rows in self._rows()]
        joined = self._by_columns(x) if self._many(x) else self._by_rows(x)
        outputs = joined.split([layer.out_features for layer in self.layers], -1)
        # Pairs have their bias in the second factor.
        biases = [layer.bias if type(layer) is PivotLinear else None for layer in self.layers]
        return [y if bias is None else y + bias for y, bias in zip(outputs, biases, strict=True)]

    def _rows(self) -> Iterable[tuple[CompressedLinear, tuple[int, int]]]:
        """Yield the layers, and where the joint product has theirs: the first number, and how many."""
        return zip(self.layers, zip(self.starts, (layer.rank for layer in self.layers), strict=True), strict=True)

    def _many(self, x: Tensor) -> bool:
        """Tell whether tokens are computed as columns: many of them, and pivot layers only."""
        parts = [layer.interpolation for layer in self.layers if isinstance(layer, PivotLinear)]
        return len(parts) == len(self.layers) and by_columns(x, *self.readers, *parts)

    def _by_rows(self, x: Tensor) -> Tensor:
        """Return the outputs of all (..., out) in their order."""
        z = linear(x, self.joint)
        own = [_others(layer, z.narrow(-1, *rows)) for layer, rows in self._rows()]
        assert self.order is not None
        return torch.cat([z, *own], -1).index_select(-1, self.order.to(x.device))

    def _by_columns(self, x: Tensor) -> Tensor:
        """See `_by_rows`: the same with tokens as columns inside."""
        z = (x.flatten(0, -2) @ self.joint.t()).t().contiguous()
        others = [(cast("PivotLinear", layer).interpolation.weight, rows) for layer, rows in self._rows()]
        own = [weight @ z.narrow(0, *rows) for weight, rows in others]
        assert self.order is not None
        return torch.cat([z, *own]).index_select(0, self.order).t().contiguous().unflatten(0, x.shape[:-1])


class _Member:
    """One layer of a group; its method stands in for the layer's `forward`."""

    def __init__(self, group: PackedGroup, number: int) -> None:
        self.group, self.number = group, number

    def forward(self, x: Tensor) -> Tensor:
        return self.group.output(self.number, x)


def reader(layer: nn.Module) -> nn.Linear | None:
    """Return the part that multiplies the inputs, where several layers may share one product; else None.

    That is A of a pair, and the skeleton of a pivot layer that stores outputs. Layers and parts that another library
    has changed are left alone.
    """
    part: Any = None
    if "forward" in vars(layer) and not is_joined(layer):
        return None
    if type(layer) is LowRankLinear:
        part = layer.A
    elif type(layer) is PivotLinear and layer.side == "out":
        part = layer.skeleton
    return part if is_plain(part) else None


def join(layers: Sequence[CompressedLinear]) -> None:
    """Compute layers of the same inputs together from now on, in place.

    Raises:
        ValueError: they have no readers of one width, dtype and device.
    """
    readers = [reader(layer) for layer in layers]
    if len({None if part is None else _place(part) for part in readers} | {None}) != 2 or None in readers:
        raise ValueError("these layers have no first factors of one width, dtype and device")
    group = PackedGroup(layers)
    for number, layer in enumerate(layers):
        layer.forward = _Member(group, number).forward


def is_joined(layer: nn.Module) -> bool:
    """Tell whether a layer is computed together with others."""
    return group_of(layer) is not None


def group_of(layer: nn.Module) -> PackedGroup | None:
    """Return the group that a layer is computed in."""
    member = getattr(vars(layer).get("forward"), "__self__", None)
    return member.group if isinstance(member, _Member) else None


def part(layer: nn.Module) -> None:
    """Compute a layer by itself again."""
    if is_joined(layer):
        del layer.forward


def lie_by_columns(part: nn.Linear) -> None:
    """Let the weight of a part lie in memory by columns, in place; its shape stays."""
    part.weight.data = part.weight.data.t().contiguous().t()


def lie_by_rows(part: nn.Linear) -> None:
    """Let the weight of a part lie in memory by rows, as it is stored, in place."""
    part.weight.data = part.weight.data.contiguous()


def own_parts(layer: CompressedLinear) -> list[tuple[str, nn.Linear]]:
    """Return the parts of a layer that are plain linear layers on a CPU with memory of their own, and their names."""
    joined = reader(layer) if is_joined(layer) else None
    parts = [(name, part) for name, part in layer.named_children() if type(part) is nn.Linear and part is not joined]
    return [(name, part) for name, part in parts if part.weight.device.type in ("cpu", "meta") and part.weight.numel()]


def _place(part: nn.Linear) -> tuple[Any, ...]:
    return part.in_features, part.weight.dtype, part.weight.device


def _others(layer: Any, z: Tensor) -> Tensor:
    """Return the outputs of a layer that are not in z: all of a pair, the rest of a pivot layer."""
    found: Tensor = (layer.interpolation if isinstance(layer, PivotLinear) else layer.B)(z)
    return found


def _joint_order(layers: Sequence[CompressedLinear], starts: Sequence[int], joint: Tensor) -> Tensor | None:
    """Return the places of all outputs in z and what follows it; None where z holds no outputs."""
    if not any(isinstance(layer, PivotLinear) for layer in layers):
        return None
    found, own = [], len(joint)
    for layer, start in zip(layers, starts, strict=True):
        if isinstance(layer, PivotLinear):
            order = layer.order.to(joint.device, torch.long)
            found.append(torch.where(order < layer.rank, order + start, order - layer.rank + own))
            own += layer.out_features - layer.rank
        else:
            found.append(torch.arange(own, own + layer.out_features, device=joint.device))
            own += layer.out_features
    return torch.cat(found)


def _orders(layers: Sequence[CompressedLinear]) -> list[tuple[int, int]]:
    """Identify the orders of layers and what they hold: both change where other layers are loaded into these."""
    orders = [layer.order for layer in layers if isinstance(layer, PivotLinear)]
    return [(id(order), 0 if order.is_inference() else order._version) for order in orders]
