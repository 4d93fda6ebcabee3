"""A pretend form of layers: a pair of factors, every number in 8 bits."""

import torch
from torch import nn

from slimrank.layers.base import CompressedLinear
from slimrank.layers.layer_form import LayerForm


class EightBits(CompressedLinear):
    kind = "eight_bits"

    def __init__(self, in_features, out_features, rank, bias=False, device=None, dtype=None):
        super().__init__(in_features, out_features, rank)
        self.register_buffer("a", torch.zeros(rank, in_features, dtype=torch.int8, device=device))
        self.register_buffer("b", torch.zeros(out_features, rank, dtype=torch.int8, device=device))
        self.scales = nn.Parameter(torch.ones(2, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    def forward(self, x):
        return nn.functional.linear((x @ (self.scales[0] * self.a).t()), self.scales[1] * self.b, self.bias)

    def factors(self):
        return self.a * self.scales[0].detach().double(), self.b * self.scales[1].detach().double()

    def set_b(self, B):
        scale = B.abs().max() / 127
        self.scales.data, self.b = (
            torch.stack([self.scales.data[0], scale.to(self.scales)]),
            (B / scale).round().char().contiguous(),
        )


class EightBitsForm(LayerForm):
    name = "eight_bits"
    stored = staticmethod(lambda m, n, rank: rank * (m + n) + 2)
    stored_bits = staticmethod(lambda m, n, rank, width: 8 * rank * (m + n) + 2 * width)

    def build(self, A, B, bias, dtype):
        layer, scale = EightBits(A.shape[1], len(B), len(A), dtype=dtype), A.abs().max() / 127
        layer.a, layer.scales.data = (A / scale).round().char().contiguous(), torch.stack([scale, scale]).to(dtype)
        layer.set_b(B)
        layer.set_bias(None if bias is None else bias.to(dtype))
        return layer
