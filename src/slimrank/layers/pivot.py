"""A linear layer of low rank, stored in some of its own rows or columns.

This file is copied into every saved model (it is what `trust_remote_code=True` runs), so it imports
nothing but torch.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn


class PivotLinear(nn.Module):
    """A weight W (m x n) of rank r in r (m + n) - r^2 parameters: PiFa, arXiv 2501.19090.

    side "out": `skeleton` (n -> r) gives r of the outputs, `interpolation` (r -> m - r) the others from them, and
    `order` puts both in their places. side "in": `order` parts the inputs into r and n - r, `interpolation`
    (n - r -> r) adds the latter to the former, and `skeleton` (r -> m) gives the outputs.

    Both parts are ordinary `nn.Linear` modules without bias; the bias of the original layer is the layer's own.
    """

    order: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        side: Literal["out", "in"] = "out",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f"rank must be 1 to {min(in_features, out_features)}, got {rank}")
        self.in_features, self.out_features, self.rank, self.side = in_features, out_features, rank, side
        whole, ends, middle = (
            (out_features, (in_features, rank), (rank, out_features - rank))
            if side == "out"
            else (in_features, (rank, out_features), (in_features - rank, rank))
        )
        self.skeleton = nn.Linear(*ends, bias=False, device=device, dtype=dtype)
        self.interpolation = nn.Linear(*middle, bias=False, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("order", torch.arange(whole, dtype=torch.int32, device=device))

    @classmethod
    def from_parts(
        cls, side: Literal["out", "in"], skeleton: Tensor, interpolation: Tensor, order: Tensor, bias: Tensor | None
    ) -> PivotLinear:
        """A layer that holds these tensors themselves.

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
        if self.side == "out":
            z = self.skeleton(x)
            y = torch.cat([z, self.interpolation(z)], -1).index_select(-1, self.order)
        else:
            pivots, rest = x.index_select(-1, self.order).tensor_split([self.rank], -1)
            y = self.skeleton(pivots + self.interpolation(rest))
        return y if self.bias is None else y + self.bias

    @property
    def weight(self) -> Tensor:
        """The dense weight (out x in), made anew at each access: for code that looks at weights."""
        s, t = self.skeleton.weight, self.interpolation.weight
        if self.side == "out":
            return torch.cat([s, t @ s]).index_select(0, self.order)
        return torch.cat([s, s @ t], -1).index_select(-1, self.order.argsort())

    def set_bias(self, bias: Tensor | None) -> None:
        """Hold this bias (out), or none."""
        self.bias = None if bias is None else nn.Parameter(bias)

    def to_dense(self) -> nn.Linear:
        """An ordinary `nn.Linear` that computes the same function."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.weight.detach().clone())
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone())
        return dense

    def extra_repr(self) -> str:
        """Shape, rank and side, as `print(model)` shows them."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, rank={self.rank}, side={self.side}"
