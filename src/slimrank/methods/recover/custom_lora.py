"""A LoRA beside the whole layer, as LEMS ships it: the rank of every layer grows, and so does the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.errors import ModelError
from slimrank.layers.adapters import Alpha, Rank
from slimrank.layers.base import compressed_layers
from slimrank.layers.low_rank import LowRankLinear
from slimrank.layers.trainable import train_only
from slimrank.methods.recoverer import Phase, recoverer


@recoverer(
    id="custom_lora",
    title="LoRA beside each layer, which adds to its rank",
    paper="LEMS, its strategy custom_lora",
    defaults={"kl": 0.0, "label": 1.0},
    changes_size=True,
)
def custom_lora(model: Any, blocks: Sequence[str], *, rank: Rank = 8, alpha: Alpha = 16.0) -> Phase:
    """Append rows to A and columns to B, and train these alone: y = B A x + (alpha / rank) Q P x."""
    grown, handles, before = set(), [], []
    for path, layer in compressed_layers(model).items():
        if type(layer) is not LowRankLinear:
            raise ModelError(f"'{path}' is of the kind '{layer.kind}'; only pairs grow.", "--method lora")
        before.append((layer, layer.A, layer.B, layer.rank))
        handles += _grow(layer, rank, alpha / rank)
        grown |= {f"{path}.A.weight", f"{path}.B.weight"}
    train_only(model, lambda name: name in grown)
    kept = yield f"{rank} more ranks of every layer"
    for handle in handles:
        handle.remove()
    if not kept:
        for layer, a, b, old in before:
            layer.A, layer.B, layer.rank = a, b, old


@torch.no_grad()
def _grow(layer: LowRankLinear, rank: int, scale: float) -> list[Any]:
    """Add to the rank of a layer without changing its outputs; gradients of the old part are zero."""
    a, b, old = layer.A.weight, layer.B.weight, layer.rank
    rows = scale * torch.randn(rank, a.shape[1]).to(a)
    layer.A = _linear(torch.cat([a, rows]), None)
    layer.B = _linear(torch.cat([b, b.new_zeros(len(b), rank)], dim=1), layer.B.bias)
    layer.rank = old + rank
    return [
        layer.A.weight.register_hook(lambda g: torch.cat([torch.zeros_like(g[:old]), g[old:]])),
        layer.B.weight.register_hook(lambda g: torch.cat([torch.zeros_like(g[:, :old]), g[:, old:]], dim=1)),
    ]


def _linear(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    layer.register_parameter("bias", bias)
    return layer
