"""Text for calibration and evaluation, out of files, a hub data set, a list, or Python's own documentation.

A source is a local file or folder (.txt, .jsonl, .parquet), `hub:ID[:CONFIG[:SPLIT]]`, `demo`, or a list of
strings. (`self`, text that the model samples, is in `calibration.sampling`.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from slimrank.errors import DataError, MissingExtraError

TEXT_COLUMNS = ("text", "content", "document", "sentence")
SUFFIXES = (".txt", ".jsonl", ".parquet")
_WHAT_A_SOURCE_IS = "a .txt, .jsonl or .parquet file, a folder of them, hub:ID[:CONFIG[:SPLIT]], demo, or self"


def read_source(source: str | Path | Sequence[str], part: Literal["calibration", "evaluation"]) -> str:
    """The whole text of a source; documents are joined by blank lines, a .txt file is taken as it is.

    Args:
        source: see the module's text; a list holds one document per item.
        part: which of the two disjoint parts of the `demo` text is wanted.

    Raises:
        DataError: a missing, unreadable or empty source, or `self` for evaluation.
        MissingExtraError: a parquet file or hub data set without the extra `data`.
    """
    if source == "self" and part == "evaluation":
        raise DataError("a model is not evaluated on text that it sampled itself.", "a text of its own, or demo")
    text = "\n\n".join(_documents(source, part))
    if not text.strip():
        raise DataError(f"the text source {_name(source)} is empty.", "give text with at least a few thousand words")
    return text


def _documents(source: str | Path | Sequence[str], part: str) -> Iterable[str]:
    if not isinstance(source, (str, Path)):
        return [_string(item, "the list") for item in source]
    if str(source) == "demo":
        return demo_documents(part)
    if str(source).startswith("hub:"):
        return _hub(str(source))
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
        if not files:
            raise DataError(f"the folder '{path}' holds no text.", _WHAT_A_SOURCE_IS)
        return [doc for file in files for doc in _file(file)]
    if not path.is_file():
        raise DataError(f"the text source '{source}' does not exist.", _WHAT_A_SOURCE_IS)
    return _file(path)


def _file(path: Path) -> Iterable[str]:
    if path.suffix == ".jsonl":
        return _jsonl(path)
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix == ".txt":
        return [_decode(path)]
    raise DataError(f"slimrank cannot read text out of '{path}'.", _WHAT_A_SOURCE_IS)


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"'{path}' is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}.",
            f"convert it, e.g. iconv -f latin1 -t utf-8 '{path}'",
        ) from error


def _jsonl(path: Path) -> list[str]:
    documents = []
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"line {number} of '{path}' is not JSON: {error.msg}.", "one JSON object per line"
                ) from error
            documents.append(_row_text(row, f"line {number} of '{path}'"))
    return documents


def _parquet(path: Path) -> list[str]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data", f"reading '{path.name}'") from error
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' is not a readable parquet file: {error}.", _WHAT_A_SOURCE_IS) from error
    column = _text_column(table.column_names, f"'{path}'")
    return [_string(value, f"column '{column}' of '{path}'") for value in table[column].to_pylist()]


def _hub(source: str) -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "data", f"the data set '{source}'") from error
    name, config, split, *rest = [*source.removeprefix("hub:").split(":"), "", "", ""][:4]
    if not name or any(rest):
        raise DataError(
            f"'{source}' is no data set.",
            "hub:ID[:CONFIG[:SPLIT]], e.g. hub:Salesforce/wikitext:wikitext-2-raw-v1:train",
        )
    try:
        data = datasets.load_dataset(name, config or None, split=split or "train", trust_remote_code=False)
    except Exception as error:  # the library raises many unrelated classes
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"the data set '{source}' cannot be loaded: {reason}", "check the id and the network"
        ) from error
    column = _text_column(data.column_names, f"'{source}'")
    return [_string(value, f"'{source}'") for value in data[column]]


def _row_text(row: Any, where: str) -> str:
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise DataError(
            f"{where} is neither a string nor an object.", "one JSON object per line, its text under 'text'"
        )
    return _string(row[_text_column(list(row), where)], where)


def _text_column(names: Sequence[str], where: str) -> str:
    for name in TEXT_COLUMNS:
        if name in names:
            return name
    raise DataError(
        f"{where} has no text column: {', '.join(map(str, names))}.",
        f"name it one of {', '.join(TEXT_COLUMNS)}",
    )


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} holds a {type(value).__name__} where text is expected.", "give strings")
    return value


def demo_documents(part: str) -> list[str]:
    """The language reference that ships with every Python, one document a topic; every fourth is for evaluation."""
    from pydoc_data.topics import topics

    names = sorted(topics, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    wanted = [name for i, name in enumerate(names) if (i % 4 == 0) == (part == "evaluation")]
    return [topics[name].strip() for name in wanted]


def _name(source: object) -> str:
    return f"'{source}'" if isinstance(source, (str, Path)) else "given as a list"
