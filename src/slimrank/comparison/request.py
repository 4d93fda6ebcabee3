"""What the cells of a comparison are measured on, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

from slimrank.evaluate.tasks import TaskRequest

RECORD = 2  # what records of cells hold: older ones are made anew


class MeasureOptions(TypedDict, total=False):
    """Keywords of `compare` about measuring; see `Measurement`."""

    texts: Sequence[str]
    windows: int | None
    seq_len: int | None
    tasks: TaskRequest | None
    device: str
    dtype: str


@dataclass(frozen=True)
class Measurement:
    """How every cell, and the original, is measured.

    Attributes:
        texts: sources to measure perplexity and agreement on.
        windows: first windows of each text; None takes all.
        seq_len: tokens per window; None takes 512 or the model's context.
        tasks: the tasks to run.
        device: where to measure and compress.
        dtype: dtype to load the model in.
    """

    texts: Sequence[str] = ("demo",)
    windows: int | None = 16
    seq_len: int | None = None
    tasks: TaskRequest | None = None
    device: str = "auto"
    dtype: str = "auto"

    def plain(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        return {
            "texts": list(self.texts), "windows": self.windows, "seq_len": self.seq_len, "device": self.device,
            "dtype": self.dtype, "tasks": None if self.tasks is None else _plain(self.tasks), "record": RECORD,
        }  # fmt: skip


def _plain(tasks: TaskRequest) -> dict[str, Any]:
    return {**asdict(tasks), "folder": None if tasks.folder is None else str(tasks.folder)}
