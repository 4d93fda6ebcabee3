"""What was converted: conversion.json, and the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from slimrank._version import __version__
from slimrank.checkpoint.output_folder import CARD
from slimrank.store import write_text

RECORD = "conversion.json"


@dataclass(frozen=True)
class ConversionRecord:
    """One conversion.

    Attributes:
        source: the model, as the user named it.
        layout: id of its layout.
        made_by: the same in words.
        base: hub id of the original, if it is stated.
        facts: what its configuration says besides.
        ranks: path of each compressed layer -> its rank.
        parameters: of the whole model.
        dense_parameters: the same, if the layers were dense.
        notes: what was left out, and deviations.
    """

    source: str
    layout: str
    made_by: str
    base: str | None
    facts: Mapping[str, Any]
    ranks: Mapping[str, int]
    parameters: int
    dense_parameters: int
    notes: list[str]

    def plain(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        return {"slimrank": __version__, **asdict(self)}

    def summary(self) -> str:
        """Return the size in one line."""
        low, high = min(self.ranks.values()), max(self.ranks.values())
        share = 100 * self.parameters / self.dense_parameters
        return (
            f"{len(self.ranks)} compressed layers of {self.made_by}, ranks {low} to {high}; {self.parameters:,} "
            f"parameters, {share:.1f} % of those of the dense model"
        )


def write_record(record: ConversionRecord, card: Mapping[str, Any], folder: Path) -> None:
    """Write conversion.json and the model card into a folder.

    Args:
        record: what was done.
        card: metadata of the card that came with the model.
        folder: where to.
    """
    write_text(folder / RECORD, json.dumps(record.plain(), indent=1) + "\n")
    write_text(folder / CARD, str(ModelCard(f"---\n{_metadata(record, card).to_yaml()}\n---\n\n{_page(record)}")))


def _metadata(record: ConversionRecord, card: Mapping[str, Any]) -> ModelCardData:
    kept = {key: card[key] for key in ("license", "license_name", "license_link", "language") if card.get(key)}
    return ModelCardData(
        base_model=record.base,
        base_model_relation="quantized" if record.base else None,  # the hub has no word for "compressed"
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["slimrank", "low-rank", "svd", "compressed"],
        **kept,
    )


def _page(record: ConversionRecord) -> str:
    facts = [f"- {name}: {value}" for name, value in record.facts.items()]
    lines = [
        f"# {record.base or record.source}, compressed by {record.made_by}",
        "",
        f"`{record.source}`, converted by slimrank {__version__}: {record.summary()}.",
        *(["", *facts] if facts else []),
        "",
        "```python",
        "import slimrank  # or trust_remote_code=True below",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this-folder-or-its-hub-id")',
        "```",
    ]
    return "\n".join([*lines, *(["", *(f"- {note}" for note in record.notes)] if record.notes else [])]) + "\n"
