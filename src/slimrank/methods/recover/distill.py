"""Distillation: all factors, norms and biases are trained towards the distributions of the original."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from slimrank.layers.base import compressed_layers
from slimrank.layers.low_rank import LowRankLinear
from slimrank.layers.trainable import outside_vocabulary, train_only
from slimrank.methods.recoverer import recoverer


@recoverer(
    id="distill",
    title="all factors, norms and biases, by the divergence from the original",
    paper="Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531",
)
def distill(
    model: Any,
    *,
    balance: Annotated[
        bool, Field(description="Give both factors of a pair equal singular values first; their product stays.")
    ] = True,
) -> Iterator[str]:
    """Train everything but embeddings and output head."""
    if balance:
        _balance_pairs(model)
    wanted = outside_vocabulary(model)
    train_only(model, lambda name: name in wanted)
    yield "everything but embeddings and output head"


@torch.no_grad()
def _balance_pairs(model: Any) -> None:
    """Balance the pairs whose factors no other layer holds."""
    layers = [layer for layer in compressed_layers(model).values() if type(layer) is LowRankLinear]
    held = [p.data_ptr() for layer in layers for p in (layer.A.weight, layer.B.weight)]
    for layer in layers:
        if all(held.count(p.data_ptr()) == 1 for p in (layer.A.weight, layer.B.weight)):
            a, b = balanced(*layer.factors())
            layer.A.weight.copy_(a)
            layer.B.weight.copy_(b)


def balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the same product B A with A A^T = B^T B, diagonal."""
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.t())
    u, s, v = torch.linalg.svd(rb @ ra.t())
    return (s.sqrt()[:, None] * v) @ qa.t(), (qb @ u) * s.sqrt()
