"""Make windows of tokens from text.

The text is tokenised whole; calibration windows are drawn uniformly over token positions, further ones to refine on are
spread evenly over the text, and evaluation takes the first windows from its start. A model whose tokenizer puts a BOS
in front of a text gets one in front of every window (without it Gemma's perplexity is 1.5 times as high).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from slimrank.errors import DataError


def draw_windows(tokens: Tensor, samples: int, seq_len: int, seed: int, bos: int | None = None) -> Tensor:
    """Draw windows at random positions (samples x seq_len), each start equally likely.

    Raises:
        DataError: fewer tokens than one window needs.
    """
    length = _length(tokens, seq_len, bos, needed=1)
    return _windows(tokens, _starts(len(tokens) - length + 1, samples, seed), length, bos)


def draw_apart(
    tokens: Tensor, counts: Sequence[int], samples: int, seq_len: int, seed: int, bos: int | None = None
) -> tuple[list[Tensor], bool]:
    """Draw more windows for each of some uses; tell whether there was room for all of them.

    Windows of a use overlap neither those of an earlier one nor the `samples` that `draw_windows` draws, unless
    there is no room left.

    Raises:
        DataError: fewer tokens than one window needs.
    """
    length = _length(tokens, seq_len, bos, needed=1)
    starts, apart = _starts_apart(len(tokens) - length + 1, counts, samples, length, seed)
    return [_windows(tokens, some, length, bos) for some in starts], apart


def draw_spread(
    tokens: Tensor, count: int, beside: tuple[Sequence[int], int], seq_len: int, seed: int, bos: int | None = None
) -> Tensor:
    """Draw windows spread evenly over the text: each at a random place of its own part, of as many equal parts.

    They do not overlap those that `draw_apart` draws, but may overlap those of `draw_windows`. At most as many
    are drawn as fit beside the former without overlap, possibly none. Drawn independently, as many windows as the text
    is long would leave out a third of it.

    Args:
        tokens: of the whole text.
        count: windows.
        beside: the `counts` and the `samples` that `draw_apart` is given.
        seq_len: tokens of a window.
        seed: the same windows for the same seed.
        bos: the token that every window begins with, if any.

    Raises:
        DataError: fewer tokens than one window needs.
    """
    length = _length(tokens, seq_len, bos, needed=1)
    places = len(tokens) - length + 1
    free = torch.ones(places, dtype=torch.bool)
    for starts in _starts_apart(places, *beside, length, seed)[0]:
        _take(free, starts, length)
    found = free.nonzero().flatten()
    return _windows(tokens, found[_even_starts(len(found), min(count, _fit(found, length)), seed)], length, bos)


def leading_windows(tokens: Tensor, windows: int, seq_len: int, bos: int | None = None) -> Tensor:
    """Return the first windows of the text, without overlap (windows x seq_len).

    Raises:
        DataError: fewer tokens than that many windows need.
    """
    length = _length(tokens, seq_len, bos, needed=windows)
    return with_bos(tokens[: windows * length].reshape(windows, length), bos)


def count_windows(tokens: Tensor, seq_len: int, bos: int | None = None) -> int:
    """Count the whole windows of a text."""
    return len(tokens) // (seq_len - (bos is not None))


def tokens_digest(windows: Tensor) -> str:
    """Return sha256 of the token ids and their shape."""
    return hashlib.sha256(str(tuple(windows.shape)).encode() + windows.numpy().tobytes()).hexdigest()


def _starts(places: int, count: int, seed: int) -> Tensor:
    return torch.randint(places, (count,), generator=torch.Generator().manual_seed(seed))


def _starts_apart(
    places: int, counts: Sequence[int], samples: int, length: int, seed: int
) -> tuple[list[Tensor], bool]:
    """Choose the starts of the windows of each use; tell whether there was room for all."""
    taken = _starts(places, samples, seed)
    free = torch.ones(places, dtype=torch.bool)
    drawn: list[Tensor] = []
    apart = True
    for number, count in enumerate(counts, 1):
        _take(free, taken, length)
        apart = apart and (bool(free.any()) or not count)
        taken = _open(free)[_starts(len(_open(free)), count, seed + number)]
        drawn.append(taken)
    return drawn, apart


def _take(free: Tensor, starts: Tensor, length: int) -> None:
    """Mark places whose windows would overlap those at `starts` as taken."""
    for start in starts.tolist():
        free[max(0, start - length + 1) : start + length] = False


def _open(free: Tensor) -> Tensor:
    """Return the places that are free; all, if none is."""
    return free.nonzero().flatten() if bool(free.any()) else torch.arange(len(free))


def _fit(starts: Tensor, length: int) -> int:
    """Count the windows that may begin at some of these places (ascending) without overlap."""
    if len(starts) == 0:
        return 0
    ends = torch.cat([(starts.diff() > 1).nonzero().flatten(), torch.tensor([len(starts) - 1])])
    stretches = ends.diff(prepend=torch.tensor([-1]))
    return int(((stretches - 1) // length + 1).sum())


def _even_starts(places: int, count: int, seed: int) -> Tensor:
    within = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return ((torch.arange(count) + within) * (places / max(1, count))).long().clamp(max=places - 1)


def _windows(tokens: Tensor, starts: Tensor, length: int, bos: int | None) -> Tensor:
    return with_bos(tokens[starts[:, None] + torch.arange(length)], bos)


def _length(tokens: Tensor, seq_len: int, bos: int | None, needed: int) -> int:
    length = seq_len - (bos is not None)
    if len(tokens) < needed * length:
        raise DataError(
            f"the text has {len(tokens):,} tokens; {needed} window(s) of {seq_len} need {needed * length:,}.",
            "give more text, a smaller --seq-len, or fewer --windows",
        )
    return length


def with_bos(windows: Tensor, bos: int | None) -> Tensor:
    """Put the BOS before every window, if there is one."""
    if bos is None:
        return windows
    return torch.cat([torch.full((len(windows), 1), bos, dtype=windows.dtype), windows], dim=1)
