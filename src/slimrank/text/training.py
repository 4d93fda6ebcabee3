"""Make windows of tokens to train on, packed without padding, and say which of their tokens are to be predicted.

Documents are tokenised one by one, in a random order, until there are enough. Each is ended by the EOS token, unless it
ends with it already, or with it and white space. Joined, they are cut into windows, which come in a random order within
an epoch. As in calibration, a BOS begins every window where the tokenizer begins a text with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from slimrank.errors import DataError, RecipeError
from slimrank.text.chats import Chat, Document
from slimrank.text.mixtures import Source, check_shares, interleaved, shares
from slimrank.text.reading import SEEDS_OF_A_PART, ReadPart, read_parts
from slimrank.text.templates import assistant_tokens, rendered
from slimrank.text.tokens import bos_of, tokenise
from slimrank.text.windows import with_bos

Sampled = Callable[[int, int, int], Tensor]


@dataclass(frozen=True)
class TrainingWindows:
    """Windows to train on.

    Attributes:
        ids: windows x seq_len, int64.
        mask: the same shape; whether the token there is one to predict. That is every token of plain text, and the
            tokens of the assistant in chats. A loss uses mask[:, 1:], as nothing precedes the first token of a window.
        notes: what reading and packing skipped or changed.
    """

    ids: Tensor
    mask: Tensor
    notes: list[str] = field(default_factory=list)


class TrainingOptions(TypedDict, total=False):
    """How much to train on, and how to read it.

    Attributes:
        tokens: about as many in all, in whole windows; None, the default, takes all text once.
        seed: the same windows for the same seed; 0 by default.
        chat: read rows with `messages` or the fields of Alpaca as chats; False by default.
        sampled: writes windows of the source `self`: `sampled(count, seq_len, seed)`.
    """

    tokens: int | None
    seed: int
    chat: bool
    sampled: Sampled


def training_windows(
    source: Source, tokenizer: Any, seq_len: int, **options: Unpack[TrainingOptions]
) -> TrainingWindows:
    """Read text and make training windows of it.

    Each document occurs at most once in an epoch. Where more tokens are asked for than there are, another epoch
    follows in another order. Parts of a mixture are packed apart, so that the windows have its exact shares.

    Args:
        source: any text source, or a mixture of them.
        tokenizer: of transformers, with an EOS token.
        seq_len: tokens of a window.
        options: see `TrainingOptions`.

    Raises:
        DataError: unreadable text, too little for one window, or no turn of the assistant in the chats.
        RecipeError: an amount or a share below one window, weights or `self` without an amount, or no chat template.
        TypeError: an unknown option.
    """
    return _training_windows(source, tokenizer, seq_len, **options)


def _training_windows(
    source: Source,
    tokenizer: Any,
    seq_len: int,
    tokens: int | None = None,
    seed: int = 0,
    **reading: Any,
) -> TrainingWindows:
    notes: list[str] = []
    parts = read_parts(source, "training", notes.append, reading.pop("chat", False))
    packer = _Packer(tokenizer, seq_len, notes, **reading)
    windows = packer.once(parts, seed) if tokens is None else packer.mixed(parts, tokens // seq_len, seed)
    ids, mask = windows[:, 0], windows[:, 1].bool()
    if not bool(mask[:, 1:].any()):
        raise DataError("the training text holds no turn of the assistant.", "give chats with answers")
    return TrainingWindows(ids, mask, notes)


@dataclass(frozen=True)
class _Packer:
    """Packs documents into windows: windows x 2 x seq_len, the ids and the mask."""

    tokenizer: Any
    seq_len: int
    notes: list[str]
    sampled: Sampled | None = None

    def once(self, parts: Sequence[ReadPart], seed: int) -> Tensor:
        """Pack all documents of all parts once."""
        if any(read.part.weight is not None for read in parts):
            raise RecipeError(
                "all text once leaves no choice of shares.", "say how many tokens, or leave out the weights"
            )
        if any(read.documents is None for read in parts):
            raise RecipeError("text that the model writes has no end.", "say how many tokens")
        return self._packed([document for read in parts for document in read.documents or ()], None, seed)

    def mixed(self, parts: Sequence[ReadPart], count: int, seed: int) -> Tensor:
        """Pack a number of windows by the shares of the parts."""
        if count < 1:
            raise RecipeError(f"the tokens to train on are fewer than one window of {self.seq_len}.", "ask for more")
        mixture = [read.part for read in parts]
        check_shares(count, mixture)
        found = []
        for number, (read, own) in enumerate(zip(parts, shares(count, mixture), strict=True)):
            with read.named(len(parts)):
                found.append(self._part(read, own, seed + SEEDS_OF_A_PART * number))
        return interleaved(found)

    def _part(self, read: ReadPart, count: int, seed: int) -> Tensor:
        if read.documents is not None:
            return self._packed(read.documents, count, seed)
        if self.sampled is None:
            raise RecipeError("no model is given that writes the text 'self'.", "give another text")
        ids = self.sampled(count, self.seq_len, seed)
        return torch.stack([ids, torch.ones_like(ids)], dim=1)

    def _packed(self, documents: Sequence[Document], count: int | None, seed: int) -> Tensor:
        """Pack that many windows in as many epochs as they need; None packs one epoch."""
        bos, stream = bos_of(self.tokenizer), _Stream(documents, self.tokenizer)
        length = self.seq_len - (bos is not None)
        found: list[Tensor] = []
        missing = count
        while missing is None or missing > 0:
            generator = torch.Generator().manual_seed(seed + len(found))
            found.append(stream.epoch(length, missing, generator)[:missing])
            if missing is None:
                self._tell_rest(stream.rest.shape[1])
                break
            missing -= len(found[-1])
        ids, mask = torch.cat(found).unbind(1)
        kept = with_bos(mask, None if bos is None else 0)
        return torch.stack([with_bos(ids, bos), kept], dim=1)

    def _tell_rest(self, tokens: int) -> None:
        if tokens:
            self.notes.append(f"the last {tokens} tokens of the training text fill no window and are left out")


class _Stream:
    """The tokens of documents, epoch after epoch; each document is tokenised when it is first needed."""

    def __init__(self, documents: Sequence[Document], tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no EOS token to end documents with.", "set tokenizer.eos_token")
        self.tokenizer = tokenizer
        self.documents = documents
        self.known: dict[int, Tensor] = {}
        self.rest = torch.empty(2, 0, dtype=torch.long)

    def epoch(self, length: int, count: int | None, generator: torch.Generator) -> Tensor:
        """Return the windows of an epoch (... x 2 x length), in a random order; at least `count`, if it has them.

        What does not fill a window is left in `rest` and begins the next epoch.

        Raises:
            DataError: the text is shorter than one window.
        """
        pieces, have = [self.rest], self.rest.shape[1]
        for tokens in self._documents(generator):
            pieces.append(tokens)
            have += tokens.shape[1]
            if count is not None and have >= count * length:
                break
        if have < length:
            raise DataError(
                f"the training text has {have:,} tokens; one window needs {length:,}.",
                "give more text, or a smaller seq_len",
            )
        whole = torch.cat(pieces, dim=1)
        full = have // length
        self.rest = whole[:, full * length :]
        windows = whole[:, : full * length].reshape(2, full, length).transpose(0, 1)
        return windows[torch.randperm(full, generator=generator)]

    def _documents(self, generator: torch.Generator) -> Iterator[Tensor]:
        for number in torch.randperm(len(self.documents), generator=generator).tolist():
            if number not in self.known:
                self.known[number] = self._tokenised(self.documents[number])
            yield self.known[number]

    def _tokenised(self, document: Document) -> Tensor:
        """Return ids and mask of a document (2 x tokens), ended by an EOS; nothing for an empty one."""
        text, is_chat = rendered(document, self.tokenizer), isinstance(document, Chat)
        ids, mask = assistant_tokens(document, self.tokenizer) if isinstance(document, Chat) else self._all(text)
        if text and not text.rstrip().endswith(self.tokenizer.eos_token):
            ids = torch.cat([ids, torch.tensor([self.tokenizer.eos_token_id])])
            mask = torch.cat([mask, torch.tensor([not is_chat])])
        return torch.stack([ids, mask.long()])

    def _all(self, text: str) -> tuple[Tensor, Tensor]:
        ids = tokenise(text, self.tokenizer)
        return ids, torch.ones(len(ids), dtype=torch.bool)
