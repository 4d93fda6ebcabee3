"""How layers of one input are computed together: one product for all that reads the inputs. Knows no engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Maker = Callable[[Tensor], nn.Module]
_READERS = {"dense": ("weight",), "pair": ("A.weight",), "residual": ("base.weight", "A.weight")}


@dataclass(frozen=True)
class Shard:
    """One layer of those that are computed together.

    Attributes:
        kind: of the layer.
        side: of a pivot layer.
        matrices: its parts, by name.
    """

    kind: str
    side: str
    matrices: Mapping[str, Tensor]

    @property
    def readers(self) -> list[Tensor]:
        """The matrices that are multiplied by the inputs."""
        if self.kind == "pivot":
            return [self.matrices["skeleton.weight"]] if self.side == "out" else []
        return [self.matrices[name] for name in _READERS[self.kind]]


class Product(nn.Module):
    """y = W x, by torch."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return W x for x (..., in)."""
        return nn.functional.linear(x, self.weight)


class Packed(nn.Module):
    """The outputs of several layers for one input, one after the other, without biases.

    Args:
        shards: the layers.
        make: makes the module of a product from its matrix.
    """

    def __init__(self, shards: Sequence[Shard], make: Maker = Product) -> None:
        super().__init__()
        readers: dict[int, tuple[int, Tensor]] = {}  # a matrix that several layers share is multiplied once
        rows = 0
        for matrix in (matrix for shard in shards for matrix in shard.readers):
            if id(matrix) not in readers:
                readers[id(matrix)] = (rows, matrix)
                rows += len(matrix)
        stacked = [matrix for _, matrix in readers.values()]
        self.first = make(torch.cat(stacked) if len(stacked) > 1 else stacked[0]) if stacked else None
        steps = [_step(shard, [readers[id(matrix)][0] for matrix in shard.readers], make) for shard in shards]
        self.steps = nn.ModuleList(steps)
        self.register_buffer("order", _joint_order(steps, rows), persistent=False)

    def forward(self, x: Tensor, total: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return the outputs (..., out).

        Args:
            x: inputs (..., in).
            total: sums z over processes, where each has a part of the inputs.
        """
        z: Any = None if self.first is None else self.first(x)
        z = total(z) if total is not None and z is not None else z
        if self.order is not None:
            parts = [step(x, z) for step in self.steps if step.own_rows]
            return torch.cat([z, *parts], -1).index_select(-1, self.order)  # type: ignore[arg-type]
        parts = [step(x, z) for step in self.steps]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class _Dense(nn.Module):
    """A dense layer, whose outputs are rows of z.

    Attributes:
        own_rows: how many outputs a step makes that are not in z.
    """

    own_rows = 0

    def __init__(self, start: int, rows: int) -> None:
        super().__init__()
        self.start, self.rows = start, rows

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the outputs."""
        return z.narrow(-1, self.start, self.rows)

    def places(self, own: int, device: Any) -> Tensor:
        """Return where in z, or in what the steps give, the outputs are; `own` is where this step's begin."""
        return torch.arange(self.start, self.start + self.rows, device=device)


class _Pair(nn.Module):
    """A pair, and what a residual layer has besides: y = B z, plus other rows of z."""

    def __init__(self, start: int, B: Tensor, base: int | None, make: Maker) -> None:
        super().__init__()
        self.start, self.base, (self.own_rows, self.rank) = start, base, B.shape
        self.second = make(B)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the outputs."""
        y = self.second(z.narrow(-1, self.start, self.rank))
        return y if self.base is None else y + z.narrow(-1, self.base, self.own_rows)

    def places(self, own: int, device: Any) -> Tensor:
        """See `_Dense.places`."""
        return torch.arange(own, own + self.own_rows, device=device)


class _PivotOut(nn.Module):
    """A pivot layer of side "out": it gives the outputs that are not rows of z already."""

    def __init__(self, start: int, rank: int, interpolation: Tensor, order: Tensor, make: Maker) -> None:
        super().__init__()
        self.start, self.rank, self.own_rows = start, rank, len(interpolation)
        self.second = make(interpolation) if self.own_rows else None
        self.outputs = order

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the outputs that are not in z; the joint order puts all in their places."""
        return self.second(z.narrow(-1, self.start, self.rank))  # type: ignore[misc]

    def places(self, own: int, device: Any) -> Tensor:
        """See `_Dense.places`."""
        order = self.outputs.long()
        return torch.where(order < self.rank, order + self.start, order - self.rank + own)


class _PivotIn(nn.Module):
    """A pivot layer of side "in", whose z is a sum of some inputs and a product of the others."""

    def __init__(self, matrices: Mapping[str, Tensor], make: Maker) -> None:
        super().__init__()
        skeleton, interpolation = matrices["skeleton.weight"], matrices["interpolation.weight"]
        self.own_rows, rank = skeleton.shape
        self.first = make(interpolation) if interpolation.shape[1] else None
        self.second = make(skeleton)
        pivots, rest = matrices["order"].tensor_split([rank])
        self.register_buffer("pivots", pivots.contiguous(), persistent=False)
        self.register_buffer("rest", rest.contiguous(), persistent=False)

    def forward(self, x: Tensor, z: Tensor | None) -> Tensor:
        """Return the outputs."""
        own = x.index_select(-1, self.pivots)  # type: ignore[arg-type]
        if self.first is not None:
            own = own + self.first(x.index_select(-1, self.rest))  # type: ignore[arg-type]
        return self.second(own)

    def places(self, own: int, device: Any) -> Tensor:
        """See `_Dense.places`."""
        return torch.arange(own, own + self.own_rows, device=device)


def _step(shard: Shard, starts: Sequence[int], make: Maker) -> Any:
    """Return what makes outputs from z; `starts` says where the products of its readers begin in z."""
    parts = shard.matrices
    if shard.kind == "dense":
        return _Dense(starts[0], len(parts["weight"]))
    if shard.kind == "pivot" and shard.side == "in":
        return _PivotIn(parts, make)
    if shard.kind == "pivot":
        return _PivotOut(starts[0], len(parts["skeleton.weight"]), parts["interpolation.weight"], parts["order"], make)
    return _Pair(starts[-1], parts["B.weight"], starts[0] if shard.kind == "residual" else None, make)


def _joint_order(steps: Sequence[Any], rows: int) -> Tensor | None:
    """Return the places of all outputs in z and the results of the steps; None where these follow one another."""
    pivots = [step for step in steps if isinstance(step, _PivotOut)]
    if not pivots:
        return None
    device, own, found = pivots[0].outputs.device, rows, []
    for step in steps:
        found.append(step.places(own, device))
        own += step.own_rows
    return torch.cat(found).to(torch.int32)
