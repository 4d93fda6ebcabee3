"""Block by block: each is trained to give what that of the original gives, with only that block on the device."""

from __future__ import annotations

from typing import Any

from slimrank.layers.trainable import blocks_of, train_only
from slimrank.methods.recoverer import Phase, recoverer


@recoverer(
    id="block",
    title="block by block, by the error of its outputs on both streams",
    paper="AA-SVD, arXiv 2604.02119; Lillama, arXiv 2412.16719",
    defaults={"kl": 0.0, "hidden": 1.0},
    by_block=True,
)
def block(model: Any) -> Phase:
    """Train all parameters of one block after the other."""
    path, count = blocks_of(model)
    for index in range(count):
        train_only(model, lambda name, mine=f"{path}.{index}.": name.startswith(mine))  # type: ignore[misc]
        yield f"block {index}"
