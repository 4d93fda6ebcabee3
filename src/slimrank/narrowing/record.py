"""What was made narrow: narrow.json, and the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from slimrank.checkpoint.output_folder import CARD
from slimrank.narrowing.blocks import NarrowedMlp
from slimrank.narrowing.request import Narrowing
from slimrank.store import write_text

RECORD = "narrow.json"
TAGS = ["slimrank", "low-rank", "narrow", "compressed"]


@dataclass(frozen=True)
class Size:
    """Parameters and bytes of a model.

    Attributes:
        linears: parameters of the linear layers in the blocks, biases left out.
        parameters: of the whole model, tied ones once.
        bytes: that its weights take in files.
    """

    linears: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class NarrowRecord:
    """One narrow model.

    Attributes:
        origin: name, hub_id and licence of the original.
        kind: its class.
        asked: what was asked.
        widths: field of the configuration -> its value before and after.
        mlps: what was done to each MLP.
        before: size of the original.
        after: size of the narrow model.
        measured: what `evaluate.suite.compare` says of both, by text.
        seconds: of the work, without measuring.
        notes: anything unusual.
        environment: what computed it.
    """

    origin: Mapping[str, Any]
    kind: str
    asked: Narrowing
    widths: Mapping[str, tuple[int, int]]
    mlps: Sequence[NarrowedMlp]
    before: Size
    after: Size
    measured: Mapping[str, Any]
    seconds: float
    notes: Sequence[str]
    environment: Mapping[str, Any]

    @property
    def keep_ratio(self) -> float:
        """Return the fraction of the linears' parameters that is kept."""
        return self.after.linears / self.before.linears

    def plain(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        return {
            **self.environment, "model": {"class": self.kind, **self.origin}, "keep_ratio": self.keep_ratio,
            "narrow": self.asked.model_dump(mode="json"), "widths": {k: list(v) for k, v in self.widths.items()},
            "size": {"before": asdict(self.before), "after": asdict(self.after)},
            "mlps": [asdict(mlp) for mlp in self.mlps], "measured": dict(self.measured), "seconds": self.seconds,
            "notes": list(self.notes),
        }  # fmt: skip

    def sizes(self) -> list[tuple[str, ...]]:
        """Return a row for each count: before, after and the ratio."""
        rows: list[tuple[str, ...]] = []
        for name, unit in (("linears", "parameters of the linears"), ("parameters", "parameters"), ("bytes", "bytes")):
            before, after = getattr(self.before, name), getattr(self.after, name)
            rows.append((unit, f"{before:,}", f"{after:,}", f"{after / before:.3f}"))
        return rows

    def quality(self) -> list[tuple[str, ...]]:
        """Return a row for each text: perplexity over the original's, and the divergence from it."""
        return [(name, f"{found['ratio']:.4f}", f"{found['kl']:.4f}") for name, found in self.measured.items()]

    def summary(self) -> str:
        """Return the widths in one line."""
        widths = ", ".join(f"{name} {before} -> {after}" for name, (before, after) in self.widths.items())
        return f"{widths}: {100 * self.keep_ratio:.1f} % of the linears' parameters"


SIZES, QUALITY = ("", "before", "after", "ratio"), ("text", "perplexity ratio", "KL, nats a token")


def write_record(record: NarrowRecord, folder: Path, with_card: bool) -> None:
    """Write narrow.json, and the model card if it may be written, into a folder."""
    write_text(folder / RECORD, json.dumps(record.plain(), indent=1) + "\n")
    if with_card:
        write_text(folder / CARD, model_card(record))


def model_card(record: NarrowRecord) -> str:
    """Return the model card, as the Hugging Face hub reads it."""
    name = record.origin["hub_id"] or record.kind
    about = ModelCardData(
        base_model=record.origin["hub_id"], **record.origin["license"], library_name="transformers",
        pipeline_tag="text-generation", tags=TAGS, model_name=f"{Path(str(record.origin['name'])).name}, narrow",
    )  # fmt: skip
    lines = [
        f"# {name}, made narrow by slimrank", "",
        f"An ordinary `{record.kind}` with fewer hidden units in its MLPs: {record.summary()}.", "",
        *_table(SIZES, record.sizes()),
    ]  # fmt: skip
    if record.measured:
        lines += ["", *_table(QUALITY, record.quality())]
    lines += ["", "It loads without slimrank:", "", "```python", *_usage(), "```", "", "## How it was made", ""]
    lines += ["    " + line for line in json.dumps(record.asked.model_dump(mode="json"), indent=1).splitlines()]
    if record.notes:
        lines += ["", *(f"- {note}" for note in record.notes)]
    return str(ModelCard("---\n" + about.to_yaml() + "\n---\n\n" + "\n".join(lines) + "\n"))


def _usage() -> list[str]:
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        'model = AutoModelForCausalLM.from_pretrained("this-folder-or-its-hub-id")',
        'tokenizer = AutoTokenizer.from_pretrained("this-folder-or-its-hub-id")',
    ]  # fmt: skip


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    head = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    return head + ["| " + " | ".join(row) + " |" for row in rows]
