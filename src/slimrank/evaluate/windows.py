"""The windows of text that models are measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from torch import Tensor
from typing_extensions import NotRequired, Unpack

from slimrank.errors import DataError, RecipeError
from slimrank.evaluate.tasks import TaskRequest
from slimrank.progress import Progress
from slimrank.text.mixtures import Part
from slimrank.text.reading import ReadPart, without_chats
from slimrank.text.sources import read_documents
from slimrank.text.texts import NO_CHATS
from slimrank.text.tokens import bos_of, check_tokens, tokenise
from slimrank.text.windows import count_windows, leading_windows


class WindowSize(TypedDict):
    """How many windows of a text, and of how many tokens.

    Attributes:
        windows: the first ones; None takes all.
        seq_len: tokens per window.
        least: without a number, take at least so many; 1 by default.
        special: let windows begin with a BOS where the tokenizer begins a text with it; True by default.
    """

    windows: int | None
    seq_len: int
    least: NotRequired[int]
    special: NotRequired[bool]


def windows_of(source: str, text: str, model: Any, tokenizer: Any, **size: Unpack[WindowSize]) -> Tensor:
    """Take the first windows of a text (windows x seq_len).

    Args:
        source: the name of the text, for errors.
        text: the text.
        model: whose embeddings the tokens need.
        tokenizer: of the model.
        size: see `WindowSize`.

    Raises:
        DataError: the text is too short.
        ModelError: it holds tokens that the model has no embedding for.
        TypeError: an unknown option.
    """
    return _windows((source, text), (model, tokenizer), **size)


def _windows(
    named: tuple[str, str],
    reader: tuple[Any, Any],
    windows: int | None,
    seq_len: int,
    least: int = 1,
    special: bool = True,
) -> Tensor:
    (source, text), (model, tokenizer) = named, reader
    bos = bos_of(tokenizer) if special else None
    tokens = tokenise(text, tokenizer, most=None if windows is None else windows * seq_len)
    check_tokens(tokens, tokenizer, model)
    try:
        return leading_windows(tokens, windows or max(least, count_windows(tokens, seq_len, bos)), seq_len, bos)
    except DataError as error:
        raise DataError(f"'{source}': {error.message}", error.hint) from error


@dataclass(frozen=True)
class TextRequest:
    """Which texts to measure on, and how much of each.

    Attributes:
        names: sources; empty if only tasks are asked for.
        windows: first windows of each text; None takes all.
        seq_len: tokens per window; None takes 512 or the model's context.
        chat: read rows of chats as such.
        given: texts that are read already, by name.
        most: name -> first windows at most, where `windows` takes all.
        bos: let windows begin with a BOS where the tokenizer begins a text with it.
    """

    names: Sequence[str]
    windows: int | None
    seq_len: int | None
    chat: bool = False
    given: Mapping[str, ReadPart] = field(default_factory=dict)
    most: Mapping[str, int] = field(default_factory=dict)
    bos: bool = True

    @classmethod
    def of(
        cls, names: Sequence[str] | None, windows: int | None, seq_len: int | None, tasks: TaskRequest | None
    ) -> TextRequest:
        """Return a request for the texts that are named, or for the demo text if nothing else is asked for.

        Raises:
            RecipeError: an option about texts, and no text.
        """
        found = names if names is not None else ("demo",) if tasks is None else ()
        for option, value in {"--windows": windows, "--seq-len": seq_len}.items():
            if value is not None and not found:
                raise RecipeError(f"{option} is about text, and none is named.", "--text demo, or a file of your own")
        return cls(found, windows, seq_len)

    def read(self, progress: Progress) -> tuple[dict[str, ReadPart], list[str]]:
        """Read the texts, and name what reading skipped or changed; without names, the demo text for a sample."""
        if self.given:
            return dict(self.given), []
        notes: list[str] = []
        texts = {
            name: ReadPart(Part(name), read_documents(name, "evaluation", notes.append, self.chat))
            for name in self.names or ("demo",)
        }
        if self.chat and without_chats(list(texts.values())):
            notes.append(NO_CHATS)
        for note in notes:
            progress.note(note)
        return texts, notes
