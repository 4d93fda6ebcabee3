"""A linear layer stored as two thin ones. Copied into saved models; imports nothing but torch."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from slimrank.layers.base import CompressedLinear, numbers


class LowRankLinear(CompressedLinear):
    """y = B (A x) + bias, where A is rank x in and B is out x rank.

    Both factors are ordinary `nn.Linear` modules, so that PEFT, quantisers, FSDP and `torch.compile` see
    what they know. The bias of the original layer lives on B.
    """

    kind: ClassVar[str] = "pair"
    format: ClassVar[int] = 1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        super().__init__(in_features, out_features, rank)
        self.A = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.B = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_factors(cls, A: Tensor, B: Tensor, bias: Tensor | None = None) -> LowRankLinear:
        """Return a layer that holds the tensors A (rank x in), B (out x rank) and bias (out) themselves."""
        layer = cls(A.shape[1], B.shape[0], A.shape[0], bias is not None, device="meta")
        layer.A.weight = nn.Parameter(A)
        layer.B.weight = nn.Parameter(B)
        layer.set_bias(bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., in) to (..., out)."""
        return self.B(self.A(x))

    def latent(self, x: Tensor) -> Tensor:
        """Return A x (..., rank)."""
        return self.A(x)

    def from_latent(self, z: Tensor) -> Tensor:
        """See `CompressedLinear.from_latent`."""
        return self.B(z)

    def factors(self) -> tuple[Tensor, Tensor]:
        """See `CompressedLinear.factors`."""
        return numbers(self.A.weight), numbers(self.B.weight)

    def set_b(self, B: Tensor) -> None:
        """See `CompressedLinear.set_b`."""
        self.B.weight.data = B.to(self.B.weight)

    def product(self) -> Tensor:
        """Return the dense product B A (out x in)."""
        return self.B.weight @ self.A.weight

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The bias of the original layer."""
        return self.B.bias

    def set_bias(self, bias: Tensor | None) -> None:
        """Hold this bias (out), or none."""
        self.B.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    def tied_names(self) -> tuple[str, ...]:
        """Return the names of both factors."""
        return ("A.weight", "B.weight")

    def shared_names(self) -> tuple[str, ...]:
        """Return the name of A."""
        return ("A.weight",)
