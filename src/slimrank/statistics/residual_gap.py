"""The gap of a compressed model's residual stream where a layer adds to it, in sums over tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimrank.statistics.accumulators import CHUNK_TOKENS


@dataclass
class ResidualGap:
    """Sums over tokens of e, the original's residual stream less the compressed model's, where a layer adds to them.

    Attributes:
        by_inputs: sum of e x'^T (m x n, float64), x' the layer's input in the compressed model.
        by_wanted: sum of e x^T, x the mixture of inputs that the target is made from.
        total: sum of e (m).
        energy: sum of |e|^2.
    """

    by_inputs: Tensor
    by_wanted: Tensor
    total: Tensor
    energy: float = 0.0

    @classmethod
    def empty(cls, m: int, n: int, device: torch.device) -> ResidualGap:
        """Return the sums of no tokens."""
        zeros = torch.zeros(2, m, n, dtype=torch.float64, device=device)
        return cls(zeros[0], zeros[1], torch.zeros(m, dtype=torch.float64, device=device))

    def add(self, lack: Tensor, inputs: Tensor, wanted: Tensor) -> None:
        """Add tokens: e (tokens x m), x' and x (tokens x n)."""
        for parts in zip(lack.split(CHUNK_TOKENS), inputs.split(CHUNK_TOKENS), wanted.split(CHUNK_TOKENS), strict=True):
            e, x, z = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts)
            self.by_inputs += (e.t() @ x).to(self.by_inputs.device)
            self.by_wanted += (e.t() @ z).to(self.by_wanted.device)
            self.total += e.sum(dim=0).to(self.total.device)
            self.energy += float(e.square().sum())

    def __add__(self, other: ResidualGap) -> ResidualGap:
        return ResidualGap(
            self.by_inputs + other.by_inputs,
            self.by_wanted + other.by_wanted,
            self.total + other.total,
            self.energy + other.energy,
        )

    def centred(self, mean: Tensor, aim: Tensor, count: int, varies: Tensor) -> ResidualGap:
        """Return the same around the means of e, x' (mean) and x (aim), for the channels of x' that vary (1, or 0)."""
        return ResidualGap(
            (self.by_inputs - torch.outer(self.total, mean)) * varies,
            self.by_wanted - torch.outer(self.total, aim),
            torch.zeros_like(self.total),
            self.energy - float(self.total.square().sum()) / count,
        )
