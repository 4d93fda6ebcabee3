"""Block by block: each is trained to give what that of the original gives, with only that block on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slimrank.layers.balancing import BalancedPairs
from slimrank.layers.trainable import Balance, train_only
from slimrank.methods.recoverer import Phase, RecoverOptions, recoverer

OF_PREDICTIONS = ("kl", "label", "hidden", "teacher_top_k")  # options of losses that a single block does not have


@recoverer(
    id="block",
    title="block by block, by the error of its outputs on both streams",
    paper="AA-SVD, arXiv 2604.02119; Lillama, arXiv 2412.16719",
    settings=tuple(name for name in RecoverOptions.model_fields if name not in OF_PREDICTIONS),
    by_block=True,
    rounds=2,  # one on each stream
)
def block(model: Any, blocks: Sequence[str], *, balance: Balance = True) -> Phase:
    """Train all parameters of one block after the other."""
    for index, path in enumerate(blocks):
        pairs = BalancedPairs(model, f"{path}.") if balance else None
        train_only(model, lambda name, mine=f"{path}.": name.startswith(mine))  # type: ignore[misc]
        kept = False
        try:
            kept = yield f"block {index}"
        finally:
            if pairs:
                pairs.end(kept)
