"""LoRA on both factors at once, merged into them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slimrank.layers.adapters import Alpha, Dropout, Rank, adapted
from slimrank.layers.trainable import parts
from slimrank.methods.recoverer import Phase, recoverer


@recoverer(
    id="lora",
    title="LoRA on both factors at once",
    paper="Hu et al., LoRA, arXiv 2106.09685; LEMS, its strategy peft_lora",
    defaults={"kl": 0.0, "label": 1.0},
)
def lora(model: Any, blocks: Sequence[str], *, rank: Rank = 8, alpha: Alpha = 16.0, dropout: Dropout = 0.05) -> Phase:
    """Train adapters on A and B of every layer, and merge them."""
    with adapted(model, parts(model, ("A", "B")), rank, alpha, dropout):
        yield "adapters on both factors"
