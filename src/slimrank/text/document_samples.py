"""Keep a random sample of many documents, so that a file larger than memory can be read."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field

from slimrank.text.chats import Chat, Document

MOST_CHARACTERS = 2**27  # of the text that windows are drawn from: about 30 million tokens


@dataclass
class DocumentSample:
    """Documents of a text; of a larger one a sample, each document equally likely, in their order.

    Attributes:
        most: characters that are kept at most; None keeps all.
        documents: how many there were.
        characters: of all of them.
    """

    most: int | None
    documents: int = 0
    characters: int = 0
    _held: int = 0
    _kept: list[tuple[float, int, Document]] = field(default_factory=list)
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    def add(self, document: Document) -> None:
        """Take another document; those with the largest random numbers are dropped where there are too many."""
        size = characters_of(document)
        heapq.heappush(self._kept, (-self._random.random(), self.documents, document))
        self.documents += 1
        self.characters += size
        self._held += size
        while self.most is not None and self._held > self.most and len(self._kept) > 1:
            self._held -= characters_of(heapq.heappop(self._kept)[2])

    def kept(self) -> list[Document]:
        """Return the documents of the sample in their order."""
        return [document for _, _, document in sorted(self._kept, key=lambda entry: entry[1])]

    def note(self) -> str:
        """Say what was left out; empty if nothing was."""
        if len(self._kept) == self.documents:
            return ""
        return (
            f"a random sample of {len(self._kept):,} of its {self.documents:,} documents is used, {self._held:,} of "
            f"{self.characters:,} characters"
        )


def characters_of(document: Document) -> int:
    """Count the characters of a document."""
    if isinstance(document, Chat):
        return sum(len(v) for message in document.messages for v in message.values() if isinstance(v, str))
    return len(document)
