"""A linear layer stored as two thin ones.

This file is copied into every saved model (it is what `trust_remote_code=True` runs), so it imports
nothing but torch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """y = B (A x) + bias, where A is rank x in and B is out x rank.

    Both factors are ordinary `nn.Linear` modules, so that PEFT, quantisers, FSDP and `torch.compile` see
    what they know. The bias of the original layer lives on B.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.A = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.B = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_factors(cls, A: Tensor, B: Tensor, bias: Tensor | None = None) -> LowRankLinear:
        """A layer that holds the tensors A (rank x in), B (out x rank) and bias (out) themselves."""
        layer = cls(A.shape[1], B.shape[0], A.shape[0], bias is not None, device="meta")
        layer.A.weight = nn.Parameter(A)
        layer.B.weight = nn.Parameter(B)
        layer.set_bias(bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., in) to (..., out)."""
        return self.B(self.A(x))

    @property
    def weight(self) -> Tensor:
        """The dense product B A (out x in), made anew at each access: for code that looks at weights."""
        return self.B.weight @ self.A.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the original layer."""
        return self.B.bias

    def set_bias(self, bias: Tensor | None) -> None:
        """Hold this bias (out), or none."""
        self.B.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    def to_dense(self) -> nn.Linear:
        """An ordinary `nn.Linear` that computes the same function."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.weight.detach().clone())
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone())
        return dense

    def extra_repr(self) -> str:
        """Shape and rank, as `print(model)` shows them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
