"""All factors, by the likelihood of the text, as LEMS ships it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slimrank.layers.trainable import parts, train_only
from slimrank.methods.recoverer import Phase, recoverer


@recoverer(
    id="tune_svd",
    title="all factors, by the likelihood of the text",
    paper="LEMS, its strategy tune_svd",
    defaults={"kl": 0.0, "label": 1.0},
)
def tune_svd(model: Any, blocks: Sequence[str]) -> Phase:
    """Train both factors of every layer."""
    wanted = {f"{path}.weight" for path in parts(model, ("A", "B"))}
    train_only(model, lambda name: name in wanted)
    yield "all factors"
