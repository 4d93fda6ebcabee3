"""Read the parts of a text, before a tokenizer is there, and draw windows from them once there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from slimrank.errors import DataError
from slimrank.text.chats import Chat, Document
from slimrank.text.mixtures import SELF, Part, Source, check_shares, parts_of, shares
from slimrank.text.rows import Tell
from slimrank.text.sources import Use, joined, read_documents
from slimrank.text.templates import rendered
from slimrank.text.tokens import bos_of, tokenise
from slimrank.text.window_draws import Draws, FromMixture, FromModel, FromText
from slimrank.text.windows import leading_windows

SEEDS_OF_A_PART = 2**20  # seeds of the uses of one part differ from those of another


@dataclass(frozen=True)
class ReadPart:
    """One part of a text as read: its documents; None where the model writes it."""

    part: Part
    documents: Sequence[Document] | None

    def text(self, tokenizer: Any) -> str:
        """Return the whole text, with chats rendered."""
        return joined(rendered(document, tokenizer) for document in self.documents or ())

    @contextmanager
    def named(self, among: int) -> Iterator[None]:
        """Name the part in errors of its text, if it is one among several."""
        try:
            yield
        except DataError as error:
            if among == 1:
                raise
            raise DataError(f"the part '{self.part.source}' of the mixture: {error.message}", error.hint) from error


def read_parts(source: Source, use: Use, tell: Tell = lambda _: None, chat: bool = False) -> list[ReadPart]:
    """Read the parts of a source; a single one, if it is not a mixture.

    Args:
        source: as `parts_of` takes it.
        use: what the text is for.
        tell: called with one sentence for each kind of thing that is skipped or changed.
        chat: read rows with `messages` or the fields of Alpaca as chats.

    Raises:
        DataError: a missing, unreadable or empty part.
        RecipeError: the notation of a mixture is wrong.
        MissingExtraError: a parquet file or hub data set without the extra `data`.
    """
    found = []
    parts = parts_of(source)
    for part in parts:
        read = ReadPart(part, None)
        if part.source != SELF:
            with read.named(len(parts)):
                read = replace(read, documents=read_documents(part.source, use, tell, chat))
        found.append(read)
    return found


def without_chats(parts: Sequence[ReadPart]) -> bool:
    """Tell whether no document is a chat."""
    return not any(isinstance(document, Chat) for read in parts for document in read.documents or ())


def tokens_of(parts: Sequence[ReadPart], tokenizer: Any) -> list[Tensor]:
    """Return the tokens of each part that the model does not write."""
    return [tokenise(read.text(tokenizer), tokenizer) for read in parts if read.documents is not None]


@dataclass(frozen=True)
class Counts:
    """Numbers of windows, as in `Draws`."""

    samples: int
    apart: tuple[int, ...]
    seq_len: int
    seed: int

    def of_parts(self, parts: Sequence[Part]) -> list[Counts]:
        """Divide the windows of each use among the parts of a mixture.

        Raises:
            RecipeError: a part has no share in those that calibrate.
        """
        if self.samples:
            check_shares(self.samples, parts)
        uses = [shares(count, parts) for count in (self.samples, *self.apart)]
        divided = zip(*uses, strict=True)
        seeds = (self.seed + SEEDS_OF_A_PART * number for number in range(len(parts)))
        return [Counts(n, tuple(apart), self.seq_len, seed) for (n, *apart), seed in zip(divided, seeds, strict=True)]

    def arguments(self) -> tuple[int, tuple[int, ...], int, int]:
        """Return what every `Draws` is made of."""
        return self.samples, self.apart, self.seq_len, self.seed


def draws_of(
    parts: Sequence[ReadPart],
    counts: Counts,
    tokenizer: Any,
    sampled: Callable[[int, int, int], Tensor],
    check: Callable[[Tensor], None],
) -> Draws:
    """Return where the windows of a text come from.

    Args:
        parts: of the text.
        counts: of the windows of the whole.
        tokenizer: of the model.
        sampled: writes windows: `sampled(count, seq_len, seed)`.
        check: refuses tokens that the model cannot take.

    Raises:
        DataError: fewer tokens in a part than one window needs.
        RecipeError: chats without a chat template, or a part without a share.
    """
    mixed = [read.part for read in parts]
    found: list[Draws] = []
    for read, own in zip(parts, counts.of_parts(mixed), strict=True):
        with read.named(len(parts)):
            if read.documents is None:
                found.append(FromModel(*own.arguments(), sampled))
            else:
                tokens, bos = tokenise(read.text(tokenizer), tokenizer), bos_of(tokenizer)
                check(tokens)
                leading_windows(tokens, 1, own.seq_len, bos)
                found.append(FromText(*own.arguments(), tokens, bos))
    return found[0] if len(found) == 1 else FromMixture(*counts.arguments(), mixed, found)
