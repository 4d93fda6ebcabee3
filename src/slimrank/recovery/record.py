"""What a recovery did: recovery.json, and a page for people."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimrank._version import __version__
from slimrank.evaluate.suite import gains
from slimrank.recovery.recovering import PhaseRecord
from slimrank.recovery.request import Recovery
from slimrank.store import write_text

RECORD = "recovery.json"
PAGE = "recovery.md"


@dataclass(frozen=True)
class RecoveryRecord:
    """One recovery.

    Attributes:
        model: the compressed model.
        teacher: its original.
        asked: what was asked.
        phases: what each phase did.
        before: measurements before, beside the original; see `evaluate.suite.compare`.
        after: the same after it.
        sizes: bytes of the weights, before and after.
    """

    model: str
    teacher: str
    asked: Recovery
    phases: list[PhaseRecord]
    before: dict[str, Any]
    after: dict[str, Any]
    sizes: tuple[int, int]

    def plain(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        return {
            "slimrank": __version__, "model": self.model, "teacher": self.teacher,
            "recovery": self.asked.model_dump(mode="json"), "phases": [phase.plain() for phase in self.phases],
            "before": self.before, "after": self.after, "bytes": list(self.sizes),
        }  # fmt: skip

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Return headings and a row for each text: perplexity over the original's, and the divergence from it."""
        return gains(self.before, self.after)


def write_record(record: RecoveryRecord, folder: Path) -> None:
    """Write recovery.json and recovery.md into a folder."""
    write_text(folder / RECORD, json.dumps(record.plain(), indent=1) + "\n")
    write_text(folder / PAGE, page(record))


def page(record: RecoveryRecord, level: int = 1) -> str:
    """Return the page for people, in Markdown, with headings from a level on."""
    headings, rows = record.table()
    mark = "#" * level
    lines = [f"{mark} Recovery of {record.model}", "", f"By `{record.asked.method}`, towards {record.teacher}.", ""]
    if rows:
        lines += [*_table(headings, rows), ""]
    lines += ["Ratios are over the original. KL: nats a token.", ""]
    if record.phases and record.phases[0].stored:
        size, seconds = record.phases[0].stored
        lines += [f"Predictions of the original took {size:,} bytes on disk and {seconds:,.0f} s, before training.", ""]
    for phase in record.phases:
        end = "kept" if phase.kept else "not better, so the weights stayed as they were"
        lines += [
            f"{mark}# {phase.name[0].upper()}{phase.name[1:]}",
            "",
            f"{phase.parameters:,} parameters, {phase.tokens:,} tokens in {phase.seconds:,.0f} s "
            f"({phase.tokens / max(phase.seconds, 1e-9):,.0f} tokens/s). Held-out loss {phase.before:.4f} before, "
            f"{phase.after:.4f} after; {end}.",
            "",
            *_table(("step", "loss", "held-out loss"), [_row(*row) for row in phase.curve]),
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


def _row(step: int, loss: float | None, held_out: float | None) -> tuple[str, ...]:
    return (str(step), *("" if value is None else f"{float(value):.4f}" for value in (loss, held_out)))


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [headings, tuple("---" for _ in headings), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
