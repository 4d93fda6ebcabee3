"""How weights are rounded to integers, and how many bits that takes on disk. Copied into saved models that need it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import ceil

WIDTHS = range(2, 9)  # bits of an integer
WORD_BITS = 32  # integers are packed into words
_WRITTEN = re.compile(r"int(\d+)(?:-g(\d+))?(-sym)?")


@dataclass(frozen=True)
class Scheme:
    """Integers of a few bits, with a scale for each row or for each group of columns in it.

    Attributes:
        bits: of an integer, 2 to 8.
        group: columns that share a scale; None: all columns of a row.
        symmetric: there is no zero point.

    Raises:
        ValueError: another number of bits, or a group of no columns.
    """

    bits: int
    group: int | None = None
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise ValueError(f"weights have 2 to 8 bits, not {self.bits}")
        if self.group is not None and self.group < 1:
            raise ValueError(f"a group has at least one column, not {self.group}")

    def __str__(self) -> str:
        return f"int{self.bits}{f'-g{self.group}' if self.group else ''}{'-sym' if self.symmetric else ''}"

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Read a scheme as it is written: int4-g64, int8, int4-g128-sym.

        Raises:
            ValueError: it is not one.
        """
        found = _WRITTEN.fullmatch(text)
        if found is None:
            raise ValueError(f"'{text}' is not a scheme such as int8, int4-g64 or int4-g128-sym")
        bits, group, symmetric = found.groups()
        return cls(int(bits), int(group) if group else None, bool(symmetric))

    @property
    def codes(self) -> tuple[int, int]:
        """Return the smallest and the largest integer."""
        half = 1 << (self.bits - 1)
        return -half, half - 1

    def columns(self, width: int) -> int:
        """Return how many columns share a scale, in rows of this many."""
        return self.group or width

    def divides(self, width: int) -> bool:
        """Tell whether rows of this many columns are made of whole groups."""
        return width % self.columns(width) == 0 if width else False

    def stored_bits(self, rows: int, columns: int, width: int) -> int:
        """Return the bits of a weight on disk: packed integers and zero points, and scales of `width` bits."""
        if rows == 0 or columns == 0:
            return 0
        groups = columns // self.columns(columns)
        integers = rows * _packed(columns * self.bits)
        zeros = 0 if self.symmetric else groups * _packed(rows * self.bits)
        return integers + zeros + rows * groups * width


def _packed(bits: int) -> int:
    return WORD_BITS * ceil(bits / WORD_BITS)
