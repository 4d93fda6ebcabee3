"""Which part of a stored layer each process of a tensor-parallel engine holds. Pure functions on tensors.

Column-parallel layers (q, k, v, gate, up) give each process some outputs, row-parallel ones (o, down) some inputs.
Every kind of layer computes z from the inputs and the outputs from z, so

- by outputs: what makes z is on every process, what makes the outputs is cut by rows;
- by inputs: what makes z is cut by columns, the sum over all processes makes z whole, the rest is on every process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Role = Literal["whole", "column", "row"]
_ROWS = {"dense": ("weight",), "pair": ("B.weight",), "residual": ("base.weight", "B.weight")}
_COLUMNS = {"dense": ("weight",), "pair": ("A.weight",), "residual": ("base.weight", "A.weight")}


@dataclass(frozen=True)
class Span:
    """The outputs or inputs of a layer that are on one process.

    Attributes:
        role: "column" counts outputs, "row" inputs, "whole" all of both.
        start: the first one.
        size: how many.
    """

    role: Role = "whole"
    start: int = 0
    size: int = 0


def span_of(role: Role, total: int, size: int, rank: int, copies: int = 1) -> Span:
    """Return the span of a process.

    Args:
        role: how the layer is cut.
        total: outputs or inputs of the whole layer.
        size: those of one process.
        rank: number of the process.
        copies: processes that hold the same span, as with fewer key heads than processes.

    Raises:
        ValueError: the spans do not cover the layer.
    """
    start = rank // copies * size
    if size < 1 or total % size or start + size > total:
        raise ValueError(f"{total} numbers cannot be cut into pieces of {size} for process {rank}")
    return Span(role, start, size)


def axis_of(role: Role, kind: str, side: str, name: str) -> int | None:
    """Return the axis along which a tensor is cut as it is read; None: every process reads all of it."""
    rows = _ROWS.get(kind, ("skeleton.weight",) if side == "in" else ())
    columns = _COLUMNS.get(kind, ("skeleton.weight",) if side == "out" else ())
    if role == "column" and name in rows:
        return 0
    return 1 if role == "row" and name in columns else None


def cut(tensor: Tensor, axis: int | None, span: Span) -> Tensor:
    """Return the piece of a tensor."""
    return tensor if axis is None else tensor.narrow(axis, span.start, span.size)


def pivot_rows(matrices: Mapping[str, Tensor], span: Span) -> dict[str, Tensor]:
    """Return a pivot layer of side "out" that gives the outputs of a span.

    The rows that it keeps make all others, so every process has them. Of the other rows each has its own.
    """
    rank = len(matrices["skeleton.weight"])
    places = matrices["order"].long().narrow(0, span.start, span.size)
    is_rest = places >= rank
    order = torch.where(is_rest, rank + is_rest.cumsum(0) - 1, places)
    return {
        "skeleton.weight": matrices["skeleton.weight"],
        "interpolation.weight": matrices["interpolation.weight"].index_select(0, places[is_rest] - rank),
        "order": order.to(matrices["order"].dtype),
    }


def pivot_columns(matrices: Mapping[str, Tensor], span: Span) -> dict[str, Tensor]:
    """Return the pair that a pivot layer of side "in" is on the inputs of a span.

    Its z adds some inputs to a product of the others. A span has any number of both, so the identity is written out.
    """
    skeleton, interpolation = matrices["skeleton.weight"], matrices["interpolation.weight"]
    rank = skeleton.shape[1]
    places = torch.empty_like(matrices["order"], dtype=torch.long)
    places[matrices["order"].long()] = torch.arange(len(places), device=places.device)
    both = torch.cat([torch.eye(rank, dtype=skeleton.dtype, device=skeleton.device), interpolation], 1)
    return {"A.weight": both.index_select(1, places.narrow(0, span.start, span.size)), "B.weight": skeleton}


def local(kind: str, side: str, matrices: Mapping[str, Tensor], span: Span) -> tuple[str, dict[str, Tensor]]:
    """Return kind and parts of what a process computes, where tensors were not cut as they were read."""
    if kind == "pivot" and (side, span.role) == ("out", "column"):
        return kind, pivot_rows(matrices, span)
    if kind == "pivot" and (side, span.role) == ("in", "row"):
        return "pair", pivot_columns(matrices, span)
    return kind, dict(matrices)
