"""The windows that a recovery trains on, holds out, and is measured on."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from slimrank.errors import DataError, RecipeError
from slimrank.evaluate.paired import MIN_ITEMS
from slimrank.evaluate.suite import Suite
from slimrank.evaluate.windows import windows_of
from slimrank.methods.recoverer import RecoverOptions
from slimrank.recovery.request import Recovery
from slimrank.recovery.trainer import Windows
from slimrank.text.mixtures import SELF, parts_of
from slimrank.text.overlap import windows_found
from slimrank.text.reading import read_parts
from slimrank.text.self_sampling import sample_windows
from slimrank.text.sources import read_source
from slimrank.text.tokens import bos_of, check_tokens
from slimrank.text.training import TrainingWindows, training_windows

MOST_HELD_OUT = 4  # of so many windows, one may be held out


def check_text(asked: Recovery) -> None:
    """Make sure that all text can be read, before models are loaded.

    Raises:
        SlimrankError: it cannot.
    """
    read_parts(asked.text, "training", chat=asked.chat)
    for source in asked.evaluation:
        read_source(source, "evaluation")


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
        RecipeError: parts with shares, or text of the model itself, and no number of tokens.
        SlimrankError: text that cannot be read.
    """
    model, tokenizer = reader
    every = _packed(asked, options, reader, seq_len)
    check_tokens(every.ids.flatten(), tokenizer, model)
    counted = _predicting(every.mask)
    count = min(options.held_out, max(1, len(every.ids) // MOST_HELD_OUT))
    train, held = Windows(every.ids[count:], counted[count:]), Windows(every.ids[:count], counted[:count])
    if not has_end(asked):
        apart = ~windows_found(held.ids, train.ids.flatten())
        held = Windows(held.ids[apart], held.counted[apart])
    if not len(train) or not len(held):
        raise DataError(
            f"'{asked.text}' has {len(every.ids)} windows of {seq_len} tokens, and one to train on and another to hold "
            "out are needed.",
            "more text, fewer tokens, or a smaller --seq-len",
        )
    return train, held


def _packed(asked: Recovery, options: RecoverOptions, reader: tuple[Any, Any], seq_len: int) -> TrainingWindows:
    """Return windows of the text: all of it once, or as many as are wanted where its parts have shares.

    Further epochs of the former are left to training, so that none of them holds a held-out window.
    """
    model, tokenizer = reader
    reading: Any = {"seed": asked.seed, "chat": asked.chat, "sampled": partial(sample_windows, model, tokenizer)}
    if has_end(asked):
        return training_windows(asked.text, tokenizer, seq_len, **reading)
    if options.tokens is None:
        raise RecipeError(
            f"how many tokens of '{asked.text}'? Its parts have shares, or the model writes it.", "--tokens 500000"
        )
    wanted = options.tokens + options.held_out * seq_len
    return training_windows(asked.text, tokenizer, seq_len, tokens=wanted, **reading)


def has_end(asked: Recovery) -> bool:
    """Tell whether the text is read as a whole: its parts have no shares, and the model writes none of it."""
    return all(part.weight is None and part.source != SELF for part in parts_of(asked.text))


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
