"""Distillation: all factors, norms and biases are trained towards the distributions of the original."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from slimrank.layers.base import compressed_layers
from slimrank.layers.low_rank import LowRankLinear
from slimrank.layers.trainable import outside_vocabulary, train_only
from slimrank.methods.recoverer import Phase, recoverer


@recoverer(
    id="distill",
    title="all factors, norms and biases, by the divergence from the original",
    paper="Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531",
)
def distill(
    model: Any,
    blocks: Sequence[str],
    *,
    balance: Annotated[
        bool, Field(description="Give both factors of a pair equal singular values first; their product stays.")
    ] = True,
) -> Phase:
    """Train everything but embeddings and output head."""
    before = _balance_pairs(model) if balance else {}
    wanted = outside_vocabulary(model)
    train_only(model, lambda name: name in wanted)
    kept = yield "everything but embeddings and output head"
    if not kept:
        for parameter, own in before.items():
            parameter.data = own


@torch.no_grad()
def _balance_pairs(model: Any) -> dict[Tensor, Tensor]:
    """Balance the pairs whose factors no other layer holds; return what the factors were."""
    before: dict[Tensor, Tensor] = {}
    layers = [layer for layer in compressed_layers(model).values() if type(layer) is LowRankLinear]
    held = [p.data_ptr() for layer in layers for p in (layer.A.weight, layer.B.weight)]
    for layer in layers:
        if all(held.count(p.data_ptr()) == 1 for p in (layer.A.weight, layer.B.weight)):
            for p, new in zip((layer.A.weight, layer.B.weight), balanced(*layer.factors()), strict=True):
                before[p], p.data = p.data, new.to(p)
    return before


def balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the same product B A with A A^T = B^T B, diagonal."""
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.t())
    u, s, v = torch.linalg.svd(rb @ ra.t())
    return (s.sqrt()[:, None] * v) @ qa.t(), (qb @ u) * s.sqrt()
