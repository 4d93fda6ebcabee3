"""Compare an exported model with the one that it was made from, on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimrank.exporting.runner import Runner
from slimrank.models.contexts import evaluating

TOKENS, STEPS = 12, 4  # read at once, and then one by one
PADDING = 3
VOCABULARY_USED = 256


def difference(runner: Runner, model: Any, padded: bool = False) -> float:
    """Return the largest difference of logits over the largest logit, in float32.

    Two texts of random tokens: a prompt, then single tokens.

    Args:
        runner: the exported model in its engine.
        model: what it was made from, in float32.
        padded: the second text is padded on the left.
    """
    rows = min(VOCABULARY_USED, model.get_input_embeddings().weight.shape[0])
    ids = torch.randint(rows, (2, TOKENS + STEPS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, : PADDING if padded else 0] = 0
    runner.reset()
    parts = [runner.step(ids[:, :TOKENS], mask[:, :TOKENS])]
    parts += [runner.step(ids[:, i : i + 1]) for i in range(TOKENS, TOKENS + STEPS)]
    found = torch.cat([torch.from_numpy(part) for part in parts], 1)
    counts = mask.bool()
    expected = _logits(model, ids, mask)[counts]
    return float((found[counts] - expected).abs().max() / expected.abs().max())


def _logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the logits of the model itself, in one pass."""
    with evaluating(model):
        places = (mask.cumsum(1) - 1).clamp_min(0)
        try:
            output = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False)
        except TypeError:  # some architectures count positions by themselves
            output = model(input_ids=ids, attention_mask=mask, use_cache=False)
    logits: Tensor = output.logits.float()
    return logits
