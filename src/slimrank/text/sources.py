"""Read text for calibration and evaluation from files, a hub data set, a list, or Python's own documentation.

A source is a local file or folder (.txt, .jsonl, .json, .parquet), `hub:ID[:CONFIG[:SPLIT]]`, `demo`, or a list of
strings. (`self`, text that the model samples, is in `text.self_sampling`; mixtures of sources are in `text.mixtures`.)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Literal

from slimrank.errors import DataError, MissingExtraError, first_line
from slimrank.text.chats import Chat, Document
from slimrank.text.document_samples import MOST_CHARACTERS
from slimrank.text.files import WHAT_A_SOURCE_IS, existing, file_rows, kind_of
from slimrank.text.mixtures import SELF, Source
from slimrank.text.rows import Row, Tell, columns_of, documents, row_value

Use = Literal["calibration", "evaluation", "training"]
_SPLIT = re.compile(r"(?:^|/)(train|test|validation|valid|val|dev|eval)(?=[-_./])", re.IGNORECASE)


def read_source(source: Source, part: Use, tell: Tell = lambda _: None) -> str:
    """Read the whole text of a source without chats, see `read_documents`; `joined` says how."""
    return joined([document for document in read_documents(source, part, tell) if isinstance(document, str)])


def joined(texts: Iterable[str]) -> str:
    """Join documents by blank lines, so that a single .txt file is used as it is."""
    return "\n\n".join(texts)


def read_documents(source: Source, part: Use, tell: Tell = lambda _: None, chat: bool = False) -> list[Document]:
    """Read all documents of a source; to calibrate, of a very large one a random sample.

    Args:
        source: see the module's docstring; a list holds one document per item.
        part: what the text is for. The `demo` text has a part to evaluate on, which is disjoint from the other.
        tell: called with one sentence for each kind of thing that is skipped or changed.
        chat: read rows with `messages`, `conversations` or the fields of Alpaca as chats; without it, they are refused.

    Raises:
        DataError: a missing, unreadable or empty source, or `self` for evaluation.
        MissingExtraError: a parquet file or hub data set without the extra `data`.
    """
    if source == SELF and part == "evaluation":
        raise DataError(
            "a model cannot be evaluated on text that it wrote itself.", "give another evaluation text, such as demo"
        )

    def named(note: str) -> None:
        tell(f"{part} text {_name(source)}: {note}")

    found = documents(_rows(source, part, named, chat), named, MOST_CHARACTERS if part == "calibration" else None)
    if chat:
        chats = sum(isinstance(document, Chat) for document in found)
        if chats:
            named(f"{chats:,} of its {len(found):,} documents are chats, rendered by the tokenizer's chat template")
    if not any(isinstance(document, Chat) or document.strip() for document in found):
        raise DataError(f"the text source {_name(source)} is empty.", "give text with at least a few thousand words")
    return found


def _rows(source: Source, part: str, tell: Tell, chat: bool) -> Iterable[Row]:
    if not isinstance(source, (str, Path)):
        return ((f"item {number} of the list", item) for number, item in enumerate(source, start=1))
    if str(source) == "demo":
        return (("demo", text) for text in demo_documents(part))
    if str(source).startswith("hub:"):
        return _hub(str(source), chat)
    return _local(str(source), tell, chat)


def _local(name: str, tell: Tell, chat: bool) -> Iterator[Row]:
    path = existing(name)
    if path is not None and path.is_dir():
        return _folder(path, tell, chat)
    if path is None or not path.is_file():
        raise DataError(
            f"the text source '{_short(name)}' does not exist.",
            f"give {WHAT_A_SOURCE_IS}; in Python, also a list of texts",
        )
    return file_rows(path, chat)


def _folder(path: Path, tell: Tell, chat: bool) -> Iterator[Row]:
    """Read all files of text in a folder and in the folders inside it, in the order of their names.

    Hidden files are left out. So is plain .json, which usually describes other files in a folder.
    """
    names = sorted(file.relative_to(path) for file in path.rglob("*") if kind_of(file) and file.is_file())
    shown = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    read = [name for name in shown if name.suffix.lower() != ".json"]
    if not read:
        raise DataError(
            f"the folder '{path}' holds no text.", f"give {WHAT_A_SOURCE_IS}; name a .json file itself, not its folder"
        )
    if len(read) < len(shown):
        tell(f"{len(shown) - len(read)} .json files in the folder were not read")
    splits = {match[1].lower() for name in read if (match := _SPLIT.search(name.as_posix()))}
    if len(splits) > 1:
        tell(f"all splits in the folder were read: {', '.join(sorted(splits))}")
    return chain.from_iterable(file_rows(path / name, chat) for name in read)


def _hub(source: str, chat: bool) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "data", f"the data set '{source}'") from error
    name, config, split, *rest = [*source.removeprefix("hub:").split(":"), "", "", ""][:4]
    if not name or any(rest):
        raise DataError(
            f"'{source}' is not a data set.",
            "write hub:ID[:CONFIG[:SPLIT]], e.g. hub:Salesforce/wikitext:wikitext-2-raw-v1:train",
        )
    try:
        data = datasets.load_dataset(name, config or None, split=split or "train", trust_remote_code=False)
    except Exception as error:  # the library raises many unrelated classes
        raise DataError(
            f"the data set '{source}' cannot be loaded: {first_line(error)}", "check the id and the network"
        ) from error
    names = columns_of(data.column_names, f"'{source}'", chat)
    rows = enumerate(zip(*(data[name] for name in names), strict=True), start=1)
    places = ((f"row {number} of '{source}'", dict(zip(names, row, strict=True))) for number, row in rows)
    return ((where, row_value(row, where, chat)) for where, row in places)


def demo_documents(part: str) -> list[str]:
    """Return the language reference that ships with every Python, one document per topic.

    Every fourth topic is for evaluation. Topics repeat sections of each other, so calibration leaves out all paragraphs
    that evaluation has.
    """
    from pydoc_data.topics import topics

    names = sorted(topics, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    documents = [topics[name].strip() for name in names]
    evaluation = documents[::4]
    if part == "evaluation":
        return evaluation
    seen = {_words(paragraph) for document in evaluation for paragraph in document.split("\n\n")}
    others = (document.split("\n\n") for i, document in enumerate(documents) if i % 4)
    kept = ("\n\n".join(p for p in paragraphs if _words(p) not in seen) for paragraphs in others)
    return [document for document in kept if document]


def _words(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _name(source: Source) -> str:
    return f"'{_short(str(source))}'" if isinstance(source, (str, Path)) else "given as a list"


def _short(name: str) -> str:
    return name if len(name) <= 200 else name[:200] + "..."
