"""Factors A and B to layers of either stored form, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from slimrank.layers.low_rank import LowRankLinear
from slimrank.layers.pivot import PivotLinear
from slimrank.linalg.cost import FactorForm
from slimrank.linalg.pivot import pivoted

CompressedLinear = LowRankLinear | PivotLinear


def stored_layer(
    form: FactorForm, A: Tensor, B: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype
) -> CompressedLinear:
    """The layer y = B A x + bias in a form, its parts cast once.

    Args:
        form: "pair" or "pivot".
        A: rank x in, in as much precision as there is.
        B: out x rank.
        bias: out, or None.
        dtype: what the parts are stored in.

    Raises:
        ValueError: "pivot" at a rank above min(out, in).
    """
    if form == "pivot":
        return pivot_layer(A, B, bias, dtype=dtype)
    return LowRankLinear.from_factors(A.to(dtype).contiguous(), B.to(dtype).contiguous(), _cast(bias, dtype))


def pivot_layer(
    A: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    side: Literal["out", "in"] | None = None,
    *,
    dtype: torch.dtype,
) -> PivotLinear:
    """The layer y = B A x + bias in some of its own rows or columns: see `stored_layer` and `linalg.pivot`.

    Args:
        A: rank x in.
        B: out x rank.
        bias: out, or None.
        side: rows ("out") or columns ("in"); by default those of which there are fewer.
        dtype: what the parts are stored in.

    Raises:
        ValueError: a rank above min(out, in).
    """
    found = pivoted(A, B, side)
    parts = found.skeleton.to(dtype), found.interpolation.to(dtype)
    return PivotLinear.from_parts(found.side, *parts, found.order, _cast(bias, dtype))


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def pair_of(layer: CompressedLinear) -> tuple[Tensor, Tensor]:
    """A (rank x in) and B (out x rank) of a layer, float64 and detached: the product of what it stores."""
    if isinstance(layer, LowRankLinear):
        return layer.A.weight.detach().double(), layer.B.weight.detach().double()
    s, t = layer.skeleton.weight.detach().double(), layer.interpolation.weight.detach().double()
    identity = torch.eye(layer.rank, dtype=s.dtype, device=s.device)
    if layer.side == "out":
        return s, torch.cat([identity, t])[layer.order]
    return torch.cat([identity, t], 1)[:, layer.order.argsort()], s


def give_b(layer: CompressedLinear, B: Tensor) -> None:
    """Let a layer answer B A x, A the one of `pair_of`, as far as it can: rows that are A's own stay as they are.

    Args:
        layer: keeps its dtype.
        B: out x rank.
    """
    if isinstance(layer, LowRankLinear):
        part = layer.B
    elif layer.side == "in":
        part = layer.skeleton
    else:
        part, B = layer.interpolation, B[layer.order.argsort()[layer.rank :]]
    part.weight.data = B.to(part.weight)


def hold(layer: CompressedLinear, state: Mapping[str, Tensor]) -> None:
    """Let a layer hold tensors of this state, in their own memory; what is not in it, a bias perhaps, stays.

    Nothing is written in place: other layers may hold the tensors that were there.
    """
    held = layer.state_dict(keep_vars=True)
    for name, tensor in state.items():
        held[name].data = tensor.to(held[name], copy=True)


def compressed_layers(model: nn.Module) -> dict[str, CompressedLinear]:
    """The layers of a model that slimrank has put there, by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, (LowRankLinear, PivotLinear))}
