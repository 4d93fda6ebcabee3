"""Tokens per second of prefill and of decoding, as a user of `generate` meets them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimrank.layers.latent_cache import cache_name
from slimrank.models.cache import next_inputs
from slimrank.models.contexts import evaluating
from slimrank.models.structure import context_of

UNLIMITED = 2**31
VOCABULARY_USED = 1000  # random prompts draw from the first ids, which every vocabulary has


@dataclass(frozen=True)
class Speed:
    """Median speeds over several repetitions, batch 1.

    Attributes:
        prefill: prompt tokens per second.
        decode: generated tokens per second, with the model's cache where it has one.
        prompt: tokens of the prompt.
        new_tokens: decoding steps per repetition.
    """

    prefill: float
    decode: float
    prompt: int
    new_tokens: int


def measure_speed(model: Any, prompt: int = 256, new_tokens: int = 16, repeats: int = 3) -> Speed:
    """Measure where the model is, after one warm-up round."""
    (speed,) = measure_speeds([model], prompt, new_tokens, repeats)
    return speed


def measure_speeds(models: list[Any], prompt: int = 256, new_tokens: int = 16, repeats: int = 3) -> list[Speed]:
    """Measure several models turn by turn, so that a machine whose speed drifts treats them alike.

    Prompt and new tokens are shortened to what the smallest context of the models holds.
    """
    context = min(context_of(m) or UNLIMITED for m in models)
    new_tokens = min(new_tokens, context // 2)
    prompt = min(prompt, context - new_tokens)
    vocabulary = min(VOCABULARY_USED, *(m.get_input_embeddings().weight.shape[0] for m in models))
    ids = torch.randint(vocabulary, (1, prompt), generator=torch.Generator().manual_seed(0))
    rounds: list[list[tuple[float, float]]] = [[] for _ in models]
    for turn in range(repeats + 1):
        for times, model in zip(rounds, models, strict=True):
            prefill, decode, _ = one_round(model, ids, new_tokens)
            if turn:
                times.append((prefill, decode))
    return [
        Speed(
            prompt / statistics.median(t[0] for t in times),
            new_tokens / statistics.median(t[1] for t in times),
            prompt,
            new_tokens,
        )
        for times in rounds
    ]


def one_round(
    model: Any, ids: Tensor, new_tokens: int, cache: Callable[[Any], Any] | None = None
) -> tuple[float, float, Any]:
    """Read prompts (batch x tokens), then decode; return the seconds of both, and the last output.

    Args:
        model: where it is.
        ids: the prompts.
        new_tokens: decoding steps.
        cache: makes a cache for the model; by default the model makes its own.
    """
    given = {} if cache is None else {str(cache_name(model)): cache(model)}
    device = next(model.parameters()).device
    ids = ids.to(device)
    with evaluating(model):
        output, prefill = _timed(lambda: model(input_ids=ids, use_cache=True, **given), device)

        def decode() -> Any:
            seen, last = ids, output
            for _ in range(new_tokens):
                seen = torch.cat([seen, last.logits[:, -1:].argmax(-1)], dim=1)
                last = model(**next_inputs(model, last, seen), use_cache=True)
            return last

        last, seconds = _timed(decode, device)
        return prefill, seconds, last


def _timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    _synchronise(device)
    start = time.perf_counter()
    result = work()
    _synchronise(device)
    return result, time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
