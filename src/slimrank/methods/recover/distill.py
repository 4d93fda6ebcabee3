"""Distillation: all factors, norms and biases are trained towards the distributions of the original."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slimrank.layers.balancing import BalancedPairs
from slimrank.layers.trainable import Balance, outside_vocabulary, train_only
from slimrank.methods.recoverer import Phase, recoverer


@recoverer(
    id="distill",
    title="all factors, norms and biases, by the divergence from the original",
    paper="Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531",
    defaults={"learning_rate": 3e-5},  # 1e-4 gains nothing on models that lost little: docs/recover/distill.md
)
def distill(model: Any, blocks: Sequence[str], *, balance: Balance = True) -> Phase:
    """Train everything but embeddings and output head."""
    pairs = BalancedPairs(model) if balance else None
    wanted = outside_vocabulary(model)
    train_only(model, lambda name: name in wanted)
    kept = False
    try:
        kept = yield "everything but embeddings and output head"
    finally:
        if pairs:
            pairs.end(kept)
