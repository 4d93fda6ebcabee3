"""The windows that a recovery trains on, holds out, and is measured on."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from slimrank.errors import DataError
from slimrank.evaluate.paired import MIN_ITEMS
from slimrank.evaluate.suite import Suite
from slimrank.evaluate.windows import windows_of
from slimrank.methods.recoverer import RecoverOptions
from slimrank.recovery.request import Recovery
from slimrank.recovery.trainer import Windows
from slimrank.text.self_sampling import sample_windows
from slimrank.text.sources import read_source
from slimrank.text.tokens import bos_of, check_tokens
from slimrank.text.training import training_windows

MOST_HELD_OUT = 4  # of so many windows, one may be held out


def training_text(
    asked: Recovery, options: RecoverOptions, reader: tuple[Any, Any], seq_len: int
) -> tuple[Windows, Windows]:
    """Return windows to train on, and held-out ones of the same text.

    Args:
        asked: names the text.
        options: how many tokens, and how many held-out windows.
        reader: the model and its tokenizer.
        seq_len: tokens of a window.

    Raises:
        DataError: too little text.
        SlimrankError: text that cannot be read.
    """
    held = options.held_out
    model, tokenizer = reader
    wanted = None if options.tokens is None else options.tokens + held * seq_len
    sampled = partial(sample_windows, model, tokenizer)
    found = training_windows(
        asked.text, tokenizer, seq_len, tokens=wanted, seed=asked.seed, chat=asked.chat, sampled=sampled
    )
    check_tokens(found.ids.flatten(), tokenizer, model)
    every = Windows(found.ids, _predicting(found.mask))
    if len(every) < 2:
        raise DataError(
            f"'{asked.text}' has {len(every)} windows of {seq_len} tokens, and one to train on and one to hold out are "
            "needed.",
            "more text, or a smaller --seq-len",
        )
    count = min(held, max(1, len(every) // MOST_HELD_OUT))
    return Windows(every.ids[count:], every.counted[count:]), Windows(every.ids[:count], every.counted[:count])


def _predicting(mask: torch.Tensor) -> torch.Tensor:
    """Return the positions whose next token is one to predict (windows x tokens); the last is as the one before it."""
    return torch.cat([mask[:, 1:], mask[:, -1:]], dim=1)


def measured_text(asked: Recovery, reader: tuple[Any, Any], seq_len: int) -> Suite:
    """Return the texts to measure on, before and after.

    Raises:
        SlimrankError: text that cannot be read, or is too short.
    """
    model, tokenizer = reader
    texts: dict[str, torch.Tensor] = {}
    for source in asked.evaluation:
        text = read_source(source, "evaluation")
        size: Any = {"windows": asked.windows, "seq_len": seq_len, "least": MIN_ITEMS}
        texts[source] = windows_of(source, text, model, tokenizer, **size)
    return Suite(texts, bos_of(tokenizer) is not None)
