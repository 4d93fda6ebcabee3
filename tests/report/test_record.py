"""The record behind report.json: typed, published as a schema, and whole."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

import slimrank
from helpers import byte_tokenizer, tiny_model
from slimrank.report.html import html
from slimrank.report.record import RunRecord, record_schema
from slimrank.report.section import Section
from slimrank.report.write import markdown

SCHEMA = Path(__file__).parents[2] / "docs" / "report.schema.json"
KEYS = [
    "model", "size", "kv_bytes", "before", "after", "coverage", "allocation", "corrections", "targets", "spectra",
    "notes", "overlap", "seconds", "provenance", "sections", "record_version",
]  # fmt: skip
SECTION = {"stage": "s", "title": "Rounded", "columns": ["layer", "step"], "rows": [["q|x", "0.5"]], "note": "Why."}


def test_the_published_schema_is_that_of_the_code():
    """To publish a change: write `json.dumps(record_schema(), indent=1)` to the file."""
    assert json.loads(SCHEMA.read_text()) == record_schema()


def fields(schema):
    for part in (schema, *schema["$defs"].values()):
        yield from part.get("properties", {}).items()


def test_every_field_is_described():
    assert not [name for name, field in fields(record_schema()) if not {"description", "$ref"} & set(field)]


def test_a_report_is_a_record(run, record):
    written = json.loads((run.out / "report.json").read_text())
    typed = RunRecord.model_validate(written)
    assert list(written) == KEYS
    assert written["record_version"] == 1
    assert written["sections"] == []
    assert json.dumps(typed.content()) == json.dumps(written) == json.dumps(record)
    assert typed.after.perplexity.perplexity == record["after"]["perplexity"]["perplexity"]
    assert typed.model.class_ == "LlamaForCausalLM"


def test_a_report_tells_what_caches_take(record):
    found = record["kv_bytes"]
    assert list(found) == ["dynamic", "latent", "latent-int8", "int8", "int4"]
    assert found["dynamic"]["1"] * 4096 == found["dynamic"]["4096"]
    assert found["latent-int8"]["4096"] < found["latent"]["4096"] < found["dynamic"]["4096"]
    for text in (html(record), markdown(record)):
        assert "keys and values, int4" in text
        assert "slimrank.latent_cache keeps latents" in text
    old = {key: value for key, value in record.items() if key != "kv_bytes"}
    assert "keys and values, int4" not in markdown(old)
    assert "keys and values, int4" not in html(old)


def test_a_report_without_text_is_a_record():
    report = slimrank.compress(tiny_model(), byte_tokenizer(), keep_ratio=0.6, method="svd", evaluation=None).report
    assert list(report) == KEYS
    assert report["before"] == report["after"] == {}
    assert RunRecord.model_validate(report).content() == report


def test_records_do_not_change_and_know_their_fields(record):
    typed = RunRecord.model_validate(record)
    with pytest.raises(ValidationError, match="frozen"):
        typed.notes = []
    with pytest.raises(ValidationError, match="Extra inputs"):
        RunRecord.model_validate({**record, "extra": 1})


def test_sections_are_shown_without_knowing_their_stage(record):
    told = {**record, "sections": [SECTION, {**SECTION, "title": "Bare", "columns": [], "rows": [], "note": ""}]}
    assert RunRecord.model_validate(told).sections[0] == Section(**SECTION)
    page, text = html(told), markdown(told)
    assert '<a href="#section-2">Bare</a>' in page
    for words in ("Rounded", "Why.", "Bare"):
        assert words in page
        assert words in text
    assert "<td>q|x</td><td>0.5</td>" in page
    assert "| q\\|x | 0.5 |" in text
    assert "section-1" not in html(record)


def test_reports_from_before_sections_are_still_shown(record):
    old = {key: value for key, value in record.items() if key not in ("sections", "record_version")}
    assert html(old) == html(record)
    assert markdown(old) == markdown(record)
