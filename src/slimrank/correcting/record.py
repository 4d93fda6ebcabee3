"""What a correction did: correction.json, and a page for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimrank._version import __version__
from slimrank.correcting.request import Correction
from slimrank.evaluate.suite import gains
from slimrank.store import write_text

RECORD, PAGE = "correction.json", "README.md"


@dataclass(frozen=True)
class CorrectionRecord:
    """One correction.

    Attributes:
        quantised: the model that is corrected.
        original: what it was made of.
        asked: what was asked.
        ranks: path of each layer -> its rank.
        size: bytes of the adapter's numbers.
        weights: numbers of the corrected weights.
        before: measurements of the quantised model, beside the original; see `evaluate.suite.compare`.
        after: the same of the corrected model.
        seconds: of the work, without measuring.
        notes: anything unusual.
    """

    quantised: str
    original: str
    asked: Correction
    ranks: Mapping[str, int]
    size: int
    weights: int
    before: dict[str, Any]
    after: dict[str, Any]
    seconds: float
    notes: list[str]

    @property
    def bits(self) -> float:
        """Return the bits that the adapter adds to each corrected weight."""
        return 8 * self.size / self.weights

    def plain(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        return {
            "slimrank": __version__, "quantised": self.quantised, "original": self.original,
            "correction": self.asked.model_dump(mode="json"), "ranks": dict(self.ranks), "bytes": self.size,
            "bits_a_weight": self.bits, "before": self.before, "after": self.after, "seconds": self.seconds,
            "notes": self.notes,
        }  # fmt: skip

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Return headings and a row for each text: perplexity over the original's, and the divergence from it."""
        return gains(self.before, self.after)

    def summary(self) -> str:
        """Return the size in one line."""
        low, high = min(self.ranks.values()), max(self.ranks.values())
        return (
            f"{len(self.ranks)} layers, ranks {low} to {high}: {self.size:,} bytes, {self.bits:.2f} bits for each "
            "corrected weight"
        )


def write_record(record: CorrectionRecord, folder: Path) -> None:
    """Write correction.json and README.md into a folder."""
    write_text(folder / RECORD, json.dumps(record.plain(), indent=1) + "\n")
    write_text(folder / PAGE, page(record))


def page(record: CorrectionRecord) -> str:
    """Return a page for people."""
    lines = ["# Low-rank correction", "", f"Of `{record.quantised}`, towards `{record.original}`.", record.summary()]
    lines[-1] += "."
    headings, rows = record.table()
    if rows:
        lines += ["", "| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", "With transformers and PEFT:", "", *(f"    {line}" for line in _usage(record.quantised))]
    if record.notes:
        lines += ["", *(f"- {note}" for note in record.notes)]
    return "\n".join(lines) + "\n"


def _usage(quantised: str) -> list[str]:
    where = f'"{quantised}"'
    if quantised.endswith(".gguf"):
        path = Path(quantised)
        where = f'"{path.parent}", gguf_file="{path.name}"'
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        f"model = AutoModelForCausalLM.from_pretrained({where})",
        'model = PeftModel.from_pretrained(model, "THIS FOLDER")',
    ]
