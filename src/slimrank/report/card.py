"""The model card of a compressed model: README.md, as the Hugging Face hub reads it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from slimrank.report.render import render

TAGS = ["slimrank", "low-rank", "svd", "compressed"]
_HUB_ID = re.compile(r"(?:^|,)\s*hub:([^:,]+)")


def model_card(record: dict[str, Any]) -> str:
    """Return the card of the model of a record. It states nothing that differs from run to run, such as speeds."""
    body = render("card.md.j2", r=record, recipe=_recipe(record), reads_images=_reads_images(record))
    return str(ModelCard(f"---\n{_metadata(record).to_yaml()}\n---\n\n{body}"))


def _metadata(record: dict[str, Any]) -> ModelCardData:
    calibration = str(record["provenance"]["recipe"]["calibration"])
    return ModelCardData(
        base_model=record["model"]["hub_id"],
        base_model_relation="quantized" if record["model"]["hub_id"] else None,  # the hub has no word for "compressed"
        language=record["model"].get("language") or None,
        **record["model"]["license"],
        library_name="transformers",
        pipeline_tag="image-text-to-text" if _reads_images(record) else "text-generation",
        tags=TAGS,
        datasets=_HUB_ID.findall(calibration) or None,
        model_name=f"{Path(record['model']['name']).name}, compressed",
        metrics=["perplexity"] if record["after"] else None,
        eval_results=_results(record) or None,
    )


def _results(record: dict[str, Any]) -> list[EvalResult]:
    """Return the model's perplexity, for the hub's index of results."""
    if not record["after"]:
        return []
    text = Path(str(record["provenance"]["recipe"]["evaluation"])).name
    found = round(record["after"]["perplexity"]["perplexity"], 4)
    return [EvalResult("text-generation", "text", text, "perplexity", found)]


def _reads_images(record: dict[str, Any]) -> bool:
    return record["model"]["class"] in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()


def _recipe(record: dict[str, Any]) -> str:
    """Return the options that are set, as YAML; a plan that was given as such is in plan.json."""
    recipe = record["provenance"]["recipe"]
    given = {key: value for key, value in recipe.items() if value not in (None, {}, []) or key == "evaluation"}
    if isinstance(given.get("plan"), dict):
        given["plan"] = "plan.json"
    text: str = yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
    return text
