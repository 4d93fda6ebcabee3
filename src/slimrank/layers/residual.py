"""A linear layer of few bits and a low-rank correction. Copied into saved models; imports nothing but torch."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slimrank.layers.base import CompressedLinear, numbers


class ResidualLinear(CompressedLinear):
    """y = Q x + B (A x) + bias: Q is out x in and of few bits, A is rank x in and B out x rank.

    All three are ordinary `nn.Linear` modules. The bias of the original layer lives on Q, which is named `base`.
    `place` is their `device` and `dtype`.
    """

    kind: ClassVar[str] = "residual"

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False, **place: Any) -> None:
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        super().__init__(in_features, out_features, rank)
        self.base = nn.Linear(in_features, out_features, bias=bias, **place)
        self.A = nn.Linear(in_features, rank, bias=False, **place)
        self.B = nn.Linear(rank, out_features, bias=False, **place)

    @classmethod
    def from_parts(cls, base: nn.Linear, A: nn.Linear, B: nn.Linear) -> ResidualLinear:
        """Return a layer that holds these modules themselves."""
        layer = cls(base.in_features, base.out_features, A.out_features, device="meta")
        layer.base, layer.A, layer.B = base, A, B
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., in) to (..., out)."""
        return self.base(x) + self.B(self.A(x))

    def product(self) -> Tensor:
        """Return the dense weight Q + B A (out x in)."""
        return self.base.weight + self.B.weight @ self.A.weight

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (n x n) and B (m x n) with W = B A: its rank is not bounded, so A is the identity."""
        q, a, b = (numbers(part.weight) for part in (self.base, self.A, self.B))
        return torch.eye(self.in_features, dtype=q.dtype, device=q.device), q + b @ a

    def set_b(self, B: Tensor) -> None:
        """Not possible: the integers of Q cannot be any numbers.

        Raises:
            ValueError: always.
        """
        raise ValueError("a layer of few bits with a low-rank correction cannot be given another weight")

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The bias of the original layer."""
        return self.base.bias

    def set_bias(self, bias: Tensor | None) -> None:
        """Hold this bias (out), or none."""
        self.base.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    def tied_names(self) -> tuple[str, ...]:
        """Return the names of all three weights."""
        return ("base.weight", "A.weight", "B.weight")
