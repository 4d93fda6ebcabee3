"""Tokenise text. A long text is tokenised piece by piece, to the ids of the whole.

Pieces overlap. Two of them are joined at a token in the middle of their overlap, if both agree on the tokens around it.
If they do not, or if the text there only repeats itself, the first is tokenised again at twice its length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimrank.errors import ModelError

PIECE_CHARACTERS = 2**17
OVERLAP_CHARACTERS = 2**12
AGREEING_TOKENS = 32  # on both sides of a joint
DIFFERENT_TOKENS = 8  # among them; where one word repeats, tokens may depend on its far end


def tokenise(text: str, tokenizer: Any, most: int | None = None) -> Tensor:
    """Return token ids of a text (1-D, int64), without special tokens.

    Args:
        text: any text.
        tokenizer: of transformers. A few kinds take the whole text at once, see `_works_in_pieces`.
        most: maximum number of tokens.
    """
    parts: list[Tensor] = []
    for part in _parts(text, tokenizer):
        parts.append(part)
        if most is not None and sum(map(len, parts)) >= most:
            break
    return torch.cat(parts)[:most]


def bos_of(tokenizer: Any) -> int | None:
    """Return the BOS id, if the tokenizer itself begins a text with it."""
    bos = getattr(tokenizer, "bos_token_id", None)
    begins = tokenizer("a")["input_ids"][:1]
    return bos if bos is not None and begins == [bos] else None


def check_tokens(tokens: Tensor, tokenizer: Any, model: Any) -> None:
    """Make sure that a model has an embedding for every token, and for the BOS.

    Raises:
        ModelError: it has not.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max([bos_of(tokenizer) or 0, *([int(tokens.max())] if len(tokens) else [])])
    if largest >= rows:
        raise ModelError(
            f"the tokenizer makes token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) of the text, "
            f"but the embedding of the model ends at {rows - 1}.",
            "use the tokenizer that belongs to the model, or save the model after "
            "model.resize_token_embeddings(len(tokenizer))",
        )


@dataclass(frozen=True)
class _Piece:
    """The tokens of text[begin:end], each with its first and last character in the whole text."""

    begin: int
    end: int
    tokens: list[tuple[int, int, int]]

    def ids(self, start: int, stop: int | None = None) -> Tensor:
        return torch.tensor([token[0] for token in self.tokens[start:stop]], dtype=torch.long)


def _parts(text: str, tokenizer: Any) -> Iterator[Tensor]:
    """Yield the ids of the whole text, in order."""
    if len(text) <= PIECE_CHARACTERS or not _works_in_pieces(tokenizer):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        yield torch.tensor(ids, dtype=torch.long)
        return
    piece, start = _piece(text, tokenizer, 0, PIECE_CHARACTERS), 0
    while piece.end < len(text):
        following = _piece(text, tokenizer, piece.end - OVERLAP_CHARACTERS, PIECE_CHARACTERS)
        joint = _joint(piece, following)
        if joint is None:
            piece = _piece(text, tokenizer, piece.begin, 2 * (piece.end - piece.begin))
        else:
            yield piece.ids(start, joint[0])
            piece, start = following, joint[1]
    yield piece.ids(start)


def _works_in_pieces(tokenizer: Any) -> bool:
    """Tell whether tokens depend on the text nearby alone, and have offsets.

    A slow tokenizer has none. A Unigram model that does not split words sums scores from the beginning of the text:
    what these round to decides between equally likely tokens.
    """
    if not getattr(tokenizer, "is_fast", False):
        return False
    backend = tokenizer.backend_tokenizer
    splits = backend.pre_tokenizer is not None and len(backend.pre_tokenizer.pre_tokenize_str("a b")) > 1
    return splits or type(backend.model).__name__ != "Unigram"


def _piece(text: str, tokenizer: Any, begin: int, length: int) -> _Piece:
    part = text[begin : begin + length]
    found = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places = zip(found["input_ids"], found["offset_mapping"], strict=True)
    return _Piece(begin, begin + len(part), [(token, begin + first, begin + last) for token, (first, last) in places])


def _joint(piece: _Piece, following: _Piece) -> tuple[int, int] | None:
    """Find where two pieces join: the number of the same token in each; None if they differ around it."""
    middle = (following.begin + piece.end) // 2
    i = next((i for i, (_, first, _) in enumerate(piece.tokens) if first >= middle), None)
    if i is None or piece.tokens[i] not in following.tokens:
        return None
    j = following.tokens.index(piece.tokens[i])
    if min(i, j) < AGREEING_TOKENS:
        return None
    around, same = (
        found.tokens[at - AGREEING_TOKENS : at + AGREEING_TOKENS] for found, at in ((piece, i), (following, j))
    )
    agree = around == same and len(around) == 2 * AGREEING_TOKENS
    return (i, j) if agree and len({token[0] for token in around}) >= DIFFERENT_TOKENS else None
