"""Open files of text, compressed or not, and read lines of them without holding the whole."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slimrank.errors import DataError, MissingExtraError

COMPRESSED = (".gz", ".zst")
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "UTF-8"),
    (codecs.BOM_UTF32_LE, "UTF-32-LE"),  # begins with that of UTF-16
    (codecs.BOM_UTF32_BE, "UTF-32-BE"),
    (codecs.BOM_UTF16_LE, "UTF-16-LE"),
    (codecs.BOM_UTF16_BE, "UTF-16-BE"),
)
_HEAD = 4096


def plain_name(path: Path) -> str:
    """Return the name of a file in lower case, without the suffix of a compression."""
    name = path.name.lower()
    return next((name.removesuffix(suffix) for suffix in COMPRESSED if name.endswith(suffix)), name)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a file for reading bytes; a compressed one is decompressed on the way.

    Raises:
        DataError: it cannot be read.
        MissingExtraError: a .zst file without the extra `data`.
    """
    try:
        with _stream(path) as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"'{path}' cannot be read: {error}.", "check the file, or download it again") from error


def _stream(path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")
    if suffix != ".zst":
        return path.open("rb")
    try:
        import pyarrow
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data", f"reading '{path.name}'") from error
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path), "rb"), "zstd"))


def text_of(path: Path) -> str:
    """Decode a whole file: UTF-8, or what its byte order mark says. The mark itself is not text.

    Raises:
        DataError: it cannot be read, or is not text.
    """
    with opened(path) as file:
        content: bytes = file.read()
    mark, encoding = next((pair for pair in BYTE_ORDER_MARKS if content.startswith(pair[0])), (b"", "UTF-8"))
    if not mark and content.count(0) > len(content) / 8:
        order = "LE" if content[1::2].count(0) > content[::2].count(0) else "BE"
        raise DataError(
            f"'{path}' holds NUL bytes: it is UTF-16 without a byte order mark, or not text.",
            f"if it is text: iconv -f UTF-16{order} -t UTF-8 '{path}' > utf8.txt",
        )
    return _decoded(content[len(mark) :], encoding, path, len(mark))


def lines_of(path: Path) -> Iterator[str]:
    """Yield the lines of a file one by one; one that is not UTF-8 is read as a whole.

    Raises:
        DataError: it cannot be read, or is not text.
    """
    with opened(path) as file:
        head = file.peek(_HEAD)[:_HEAD]
        marked = any(head.startswith(mark) for mark, _ in BYTE_ORDER_MARKS)
        if not marked and head.count(0) <= len(head) / 8:
            yield from _utf8_lines(file, path)
            return
    yield from text_of(path).split("\n")


def _utf8_lines(file: Any, path: Path) -> Iterator[str]:
    at = 0
    for line in file:
        yield _decoded(line, "UTF-8", path, at).removesuffix("\n")
        at += len(line)


def _decoded(content: bytes, encoding: str, path: Path, at: int) -> str:
    """Decode a part of a file that begins at byte `at`."""
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"'{path}' is not {encoding} text: byte {error.start + at} is {content[error.start]:#04x}.",
            f"find out its encoding, then: iconv -f ENCODING -t UTF-8 '{path}' > utf8.txt",
        ) from error
