"""What lm-evaluation-harness needs around it: quiet, its seeds, and a model that it can ask."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import torch

from slimrank.errors import DataError, NonFiniteError
from slimrank.progress import Progress

BATCH_SIZE = 8  # prompts at a time


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the advice and the progress bars of lm-evaluation-harness and its data library off the screen."""
    from datasets import disable_progress_bars, enable_progress_bars
    from datasets.utils import are_progress_bars_disabled
    from lm_eval.api import task

    logger, bar, bars = logging.getLogger("lm_eval"), task.tqdm, not are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    task.tqdm = lambda items, **_: items  # has no switch
    disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        task.tqdm = bar
        if bars:
            enable_progress_bars()


@contextmanager
def seeded() -> Iterator[None]:
    """Set the global seeds of the command `lm_eval`, by which some tasks shuffle; restore the caller's afterwards."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def language_model(model: Any, tokenizer: Any, progress: Progress) -> Any:
    """Wrap a loaded model for lm-evaluation-harness; its `cut` counts the prompts that the context did not hold.

    The tokenizer is copied, since it may be given a padding token.
    """
    from lm_eval.models.huggingface import HFLM

    class Watched(HFLM):
        cut = 0

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
            progress.stage("answers to choose from", len(requests))
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
            progress.stage("texts", len(requests))
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
            progress.stage("answers to write", len(requests))
            return super().generate_until(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Sequence[Any], disable_tqdm: bool = True, **options: Any) -> Any:
            _check_lengths([len(answer) for _, _, answer in requests], self.max_length)
            self.cut += sum(len(prompt) + len(answer) > self.max_length + 1 for _, prompt, answer in requests)
            answers = super()._loglikelihood_tokens(requests, disable_tqdm=True, **options)
            if any(math.isnan(score) for score, _ in answers):
                raise NonFiniteError("the likelihood of an answer is NaN.", "evaluate in float32 (--dtype float32)")
            return answers

        def tok_batch_encode(self, strings: list[str], *args: Any, **options: Any) -> Any:
            longest = options.get("left_truncate_len") or math.inf
            self.cut += sum(len(self.tok_encode(string)) > longest for string in strings)
            return super().tok_batch_encode(strings, *args, **options)

        def _model_call(self, inps: torch.Tensor, *args: Any, **options: Any) -> Any:
            progress.step(len(inps))
            return super()._model_call(inps, *args, **options)

        def _model_generate(self, context: torch.Tensor, *args: Any, **options: Any) -> Any:
            progress.step(len(context))
            return super()._model_generate(context, *args, **options)

    return Watched(pretrained=model, tokenizer=deepcopy(tokenizer), backend="causal", batch_size=BATCH_SIZE)


def _check_lengths(answers: Sequence[int], context: int) -> None:
    """Refuse answers longer than the context. Prompts may lose their beginnings; answers must be whole."""
    if max(answers, default=0) > context:
        raise DataError(
            f"an answer of {max(answers)} tokens is longer than the model's context of {context} tokens.",
            "leave out the task of such answers, or take a model of a longer context",
        )
