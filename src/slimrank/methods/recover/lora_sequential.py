"""LoRA on one factor, then on the other, as SVD-LLM trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from slimrank.layers.adapters import Alpha, Dropout, Rank, adapted
from slimrank.layers.trainable import Part, parts
from slimrank.methods.recoverer import Phase, recoverer


@recoverer(
    id="lora_sequential",
    title="LoRA on one factor, merged, then on the other",
    paper="Wang et al., SVD-LLM, arXiv 2403.07378, section 3.3",
    defaults={"kl": 0.0, "label": 1.0},
    rounds=2,
)
def lora_sequential(
    model: Any,
    blocks: Sequence[str],
    *,
    rank: Rank = 8,
    alpha: Alpha = 16.0,
    dropout: Dropout = 0.05,
    first: Annotated[Literal["A", "B"], Field(description="The factor that is trained first.")] = "B",
) -> Phase:
    """Train adapters on one factor with the other frozen, merge them, and then the other way round."""
    order: tuple[Part, Part] = ("A", "B") if first == "A" else ("B", "A")
    for part in order:
        with adapted(model, parts(model, (part,)), rank, alpha, dropout):
            yield f"adapters on {part}"
