"""How far a model is from the one it was made of, on text: perplexity of both, divergence, and the same first choice.

Only the perplexities need labels: where a compressed model differs from the original, the original is right by
definition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import log_softmax

from slimrank.errors import ModelError, NonFiniteError
from slimrank.evaluate.perplexity import Perplexity, check_windows, summary, window_nll, windows_at_once
from slimrank.models.contexts import evaluating
from slimrank.models.divergence import divergence, positions
from slimrank.progress import Progress


@dataclass(frozen=True)
class Agreement:
    """Predictions of a model next to those of another, on the same windows.

    Attributes:
        kl: mean of KL(dense || model) over all predictions, in nats a token.
        top1: percent of predictions in which both put the same token first.
        model: perplexity of the model.
        dense: perplexity of the other.
    """

    kl: float
    top1: float
    model: Perplexity
    dense: Perplexity


def agreement(
    model: Any, dense: Any, windows: Tensor, bos: bool = False, progress: Progress | None = None
) -> Agreement:
    """Compare two models on windows of tokens (windows x seq_len), where they are, in one pass through each.

    Logits of a few windows are held at a time, one at least; what is computed of them is computed for a few positions
    at a time. Log-probabilities in float32, sums in float64.

    Raises:
        DataError: windows of fewer than two tokens.
        ModelError: the models have different vocabularies.
        NonFiniteError: NaN or infinity in the logits or the divergence, or a perplexity too large to be a number.
    """
    check_windows(windows)
    progress = progress or Progress()
    nll: list[float] = []
    dense_nll: list[float] = []
    kl, same = 0.0, 0
    with evaluating(model), evaluating(dense):
        for ids in windows.split(windows_at_once(model, windows.shape[1])):
            found, expected = _logits(model, ids), _logits(dense, ids)
            _check_shapes(found, expected)
            first = len(nll)
            nll += window_nll(model, found, ids.to(found.device), first)
            dense_nll += window_nll(dense, expected, ids.to(expected.device), first)
            apart, equal = _differences(found[:, :-1], expected[:, :-1].to(found.device))
            kl, same = kl + apart, same + equal
            progress.step(len(ids))
    return _summed(kl, same, summary(nll, windows, bos), summary(dense_nll, windows, bos))


def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids.to(next(model.parameters()).device), use_cache=False).logits
    return logits


def _check_shapes(found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape:
        raise ModelError(
            f"the models have vocabularies of {found.shape[-1]:,} and {expected.shape[-1]:,} tokens.",
            "compare a model with the one that it was made of",
        )


def _differences(found: Tensor, expected: Tensor) -> tuple[float, int]:
    """Return KL(expected || found), summed over positions (batch x tokens x vocabulary), and equal first choices."""
    kl, same = 0.0, 0
    for z, z_dense in zip(positions(found), positions(expected), strict=True):
        kl += divergence(log_softmax(z_dense.float(), dim=-1), log_softmax(z.float(), dim=-1))
        same += int((z.argmax(dim=-1) == z_dense.argmax(dim=-1)).sum())
    return kl, same


def _summed(kl: float, same: int, model: Perplexity, dense: Perplexity) -> Agreement:
    if not math.isfinite(kl):
        raise NonFiniteError(
            "the divergence of the model from the other is not a number: some logits are infinite.",
            "evaluate in float32 (--dtype float32)",
        )
    return Agreement(kl / model.tokens, 100 * same / model.tokens, model, dense)
