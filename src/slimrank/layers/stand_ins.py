"""Layers with random numbers, whose time is that of real ones of their form and rank: nothing is decomposed."""

from __future__ import annotations

import torch
from torch import nn

from slimrank.layers.base import CompressedLinear, layer_class
from slimrank.layers.dense import weight_of
from slimrank.layers.forms import layer_form


def stand_in(form: str, like: nn.Module, rank: int) -> CompressedLinear:
    """Return a layer of a form and rank, of the shape, dtype and device of a linear layer."""
    weight = weight_of(like)
    m, n = weight.shape
    rows, columns = (2, 3) if m <= n else (3, 2)  # a form may depend on which side is the longer one
    small = layer_form(form).build(torch.ones(1, columns), torch.ones(rows, 1), None, torch.float32)
    entry = {**small.entry(), "rank": rank, "in": n, "out": m, "bias": like.bias is not None}
    layer = layer_class(small.kind).from_entry(entry, weight.device, weight.dtype)
    _fill(layer, n)
    return layer.requires_grad_(False).eval()


@torch.no_grad()
def _fill(layer: CompressedLinear, n: int) -> None:
    """Give every parameter numbers of a usual size, every index an order, and integers of few bits any values."""
    draw = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=draw) / n**0.5)
    for buffer in layer.buffers():
        if buffer.dim() == 1:
            buffer.copy_(torch.randperm(len(buffer), generator=draw))
        else:
            buffer.random_(-127, 128, generator=draw)
