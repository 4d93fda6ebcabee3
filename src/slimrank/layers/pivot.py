"""A linear layer of low rank, stored in some of its own rows or columns.

Copied into saved models; imports nothing but torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from slimrank.layers.base import CompressedLinear, is_plain, numbers

INDEX_BYTES = 4  # of an entry of `order`


def by_columns(x: Tensor, *parts: nn.Module) -> bool:
    """Tell whether many tokens are better computed as columns: a CPU moves rows of them faster than single numbers.

    Only where nothing looks on: calls of the parts that are hooked, replaced, traced or of other tensors stay calls.
    """
    many = x.device.type == "cpu" and x.numel() > x.shape[-1]
    return many and not torch.compiler.is_compiling() and not torch.jit.is_tracing() and all(map(is_plain, parts))


class PivotLinear(CompressedLinear):
    """A weight W (m x n) of rank r in r (m + n) - r^2 parameters: PiFa, arXiv 2501.19090.

    side "out": `skeleton` (n -> r) gives r of the outputs, `interpolation` (r -> m - r) the others from them, and
    `order` puts both in their places. side "in": `order` parts the inputs into r and n - r, `interpolation`
    (n - r -> r) adds the latter to the former, and `skeleton` (r -> m) gives the outputs.

    Both parts are ordinary `nn.Linear` modules without bias; the bias of the original layer is the layer's own. `place`
    is their `device` and `dtype`.
    """

    kind: ClassVar[str] = "pivot"
    format: ClassVar[int] = 2
    least_nearest: ClassVar[int] = 8  # the rows that it keeps make all others, which amplifies their rounding
    order: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        side: Literal["out", "in"] = "out",
        **place: Any,
    ) -> None:
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f"rank must be 1 to {min(in_features, out_features)}, got {rank}")
        super().__init__(in_features, out_features, rank)
        self.side = side
        whole, ends, middle = (
            (out_features, (in_features, rank), (rank, out_features - rank))
            if side == "out"
            else (in_features, (rank, out_features), (in_features - rank, rank))
        )
        self.skeleton = nn.Linear(*ends, bias=False, **place)
        self.interpolation = nn.Linear(*middle, bias=False, **place)
        self.bias = nn.Parameter(torch.zeros(out_features, **place)) if bias else None
        self.register_buffer("order", torch.arange(whole, dtype=torch.int32, device=place.get("device")))

    @classmethod
    def from_parts(
        cls, side: Literal["out", "in"], skeleton: Tensor, interpolation: Tensor, order: Tensor, bias: Tensor | None
    ) -> PivotLinear:
        """Return a layer that holds these tensors themselves.

        Args:
            side: "out" or "in".
            skeleton: r x n, or m x r.
            interpolation: (m - r) x r, or r x (n - r).
            order: int32, m or n long.
            bias: m long, or None.
        """
        rank, n = (skeleton.shape[0], skeleton.shape[1]) if side == "out" else (skeleton.shape[1], len(order))
        m = len(order) if side == "out" else skeleton.shape[0]
        layer = cls(n, m, rank, side=side, device="meta")
        layer.skeleton.weight = nn.Parameter(skeleton)
        layer.interpolation.weight = nn.Parameter(interpolation)
        layer.order = order
        layer.set_bias(bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., in) to (..., out)."""
        if not by_columns(x, self.skeleton, self.interpolation):
            return self.from_latent(self.latent(x))
        y = self._of_columns(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias

    def _of_columns(self, x: Tensor) -> Tensor:
        """Return the outputs (tokens x out) of inputs (tokens x in).

        No weight is multiplied by a transposed view: bits of the result could depend on where the weight lies.
        """
        s, t = self.skeleton.weight, self.interpolation.weight
        if self.side == "out":
            z = (x @ s.t()).t().contiguous()
            return torch.cat([z, t @ z]).index_select(0, self.order).t().contiguous()
        pivots, rest = x.t().index_select(0, self.order).tensor_split([self.rank])
        return (pivots + t @ rest).t() @ s.t()

    def product(self) -> Tensor:
        """Return the dense weight (out x in)."""
        s, t = self.skeleton.weight, self.interpolation.weight
        if self.side == "out":
            return torch.cat([s, t @ s]).index_select(0, self.order)
        return torch.cat([s, s @ t], -1).index_select(-1, self.order.argsort())

    def latent(self, x: Tensor) -> Tensor:
        """Return the r numbers (..., r) that all outputs come from."""
        if self.side == "out":
            return self.skeleton(x)
        pivots, rest = x.index_select(-1, self.order).tensor_split([self.rank], -1)
        return pivots + self.interpolation(rest)

    def from_latent(self, z: Tensor) -> Tensor:
        """See `CompressedLinear.from_latent`."""
        if self.side == "out":
            y = torch.cat([z, self.interpolation(z)], -1).index_select(-1, self.order)
        else:
            y = self.skeleton(z)
        return y if self.bias is None else y + self.bias

    def factors(self) -> tuple[Tensor, Tensor]:
        """See `CompressedLinear.factors`."""
        s, t = numbers(self.skeleton.weight), numbers(self.interpolation.weight)
        identity = torch.eye(self.rank, dtype=s.dtype, device=s.device)
        if self.side == "out":
            return s, torch.cat([identity, t])[self.order]
        return torch.cat([identity, t], 1)[:, self.order.argsort()], s

    def set_b(self, B: Tensor) -> None:
        """See `CompressedLinear.set_b`; where rows are stored, those that are A's own stay as they are."""
        if self.side == "in":
            part = self.skeleton
        else:
            part, B = self.interpolation, B[self.order.argsort()[self.rank :]]
        part.weight.data = B.to(part.weight)

    def entry(self) -> dict[str, Any]:
        """See `CompressedLinear.entry`."""
        return {**super().entry(), "side": self.side}

    @classmethod
    def from_entry(
        cls, entry: Mapping[str, Any], device: torch.device | str | None, dtype: torch.dtype | None
    ) -> PivotLinear:
        """See `CompressedLinear.from_entry`."""
        shape = entry["in"], entry["out"], entry["rank"], entry["bias"]
        return cls(*shape, entry["side"], device=device, dtype=dtype)

    def tied_names(self) -> tuple[str, ...]:
        """Return the names of both parts; each layer has an order of its own."""
        return ("skeleton.weight", "interpolation.weight")

    def extra_repr(self) -> str:
        """Return shape, rank and side, as `print(model)` shows them."""
        return f"{super().extra_repr()}, side={self.side}"
