"""The model card, and where a model comes from."""

import copy
import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

import slimrank
from helpers import byte_tokenizer, tiny_model
from slimrank.models import provenance as origin
from slimrank.models.provenance import origin_of
from slimrank.recipe import Recipe
from slimrank.report.card import model_card


def changed(record, recipe=None, **model):
    other = copy.deepcopy(record)
    other["model"] |= model
    other["provenance"]["recipe"] |= recipe or {}
    return other


def test_what_is_written_is_the_card_of_the_record(run):
    written = (run.out / "README.md").read_text()
    assert written == model_card(run.report)
    data = ModelCard(written).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["slimrank", "low-rank", "svd", "compressed"]
    assert (data.base_model, data.license, data.datasets) == (None, None, None)
    assert not {"base_model_relation", "language"} & set(data.to_dict())
    assert "No licence is stated" in written


def test_metadata_of_a_model_and_text_from_the_hub(record):
    licence = {"license": "other", "license_name": "a: b", "license_link": "https://example.org/LICENSE"}
    about = {"hub_id": "Org/model-1B", "license": licence, "language": ["en"]}
    known = changed(record, {"calibration": "hub:Org/words:config:train"}, **about)
    card = ModelCard(model_card(known))
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("Org/model-1B", "quantized")
    assert (data["language"], data["metrics"]) == (["en"], ["perplexity"])
    assert {key: data[key] for key in licence} == licence
    assert data["datasets"] == ["Org/words"]
    mixed = changed(record, {"calibration": "hub:Org/words:0.5, a.txt:1,hub:Org/talk:config:train:2"})
    assert ModelCard(model_card(mixed)).data.datasets == ["Org/words", "Org/talk"]
    assert ModelCard(str(card)).data.to_dict() == data
    assert "https://huggingface.co/Org/model-1B" in card.text
    assert "No licence is stated" not in card.text


def test_it_says_what_was_measured_and_nothing_that_differs_from_run_to_run(record):
    written = model_card(record)
    for side in ("before", "after"):
        assert f"{record[side]['perplexity']['perplexity']:.2f}" in written
    (result,) = ModelCard(written).data.eval_results
    assert result.metric_value == round(record["after"]["perplexity"]["perplexity"], 4)
    assert result.dataset_name == Path(record["provenance"]["recipe"]["evaluation"]).name
    slower = copy.deepcopy(record)
    slower["after"]["peak_memory"] = 1
    slower["seconds"] = {"all": 1e6}
    assert model_card(slower) == written
    assert model_card({**record, "before": {}, "after": {}}).count("perplexity") == 0


def test_its_recipe_is_one(record):
    for recipe in (record["provenance"]["recipe"], {**record["provenance"]["recipe"], "evaluation": None}):
        block = model_card(changed(record, recipe)).split("--recipe`:\n\n")[1].split("\n\nNo licence")[0]
        assert Recipe.make(yaml.safe_load(block)) == Recipe.make(recipe)
    planned = changed(record, {"plan": {"targets": {}}, "keep_ratio": None})
    assert "plan: plan.json" in model_card(planned)


def test_its_code_loads_the_model(run):
    blocks = re.findall(r"```python\n(.*?)```", (run.out / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        space = {}
        exec(block.replace("this-folder-or-its-hub-id", str(run.out)), space)
        assert space["model"].config.slimrank
        assert space["tokenizer"]


def test_a_card_that_someone_wrote_stays(tmp_path):
    out = tmp_path / "out"
    options = {"method": "svd", "evaluation": None, "out": out, "keep_ratio": 0.6}
    first = slimrank.compress(tiny_model(), byte_tokenizer(), **options)
    assert first.report["notes"] == []
    (out / "README.md").write_text("mine")
    second = slimrank.compress(tiny_model(), byte_tokenizer(), **options, overwrite=True)
    assert (out / "README.md").read_text() == "mine"
    assert "README.md in the output folder" in second.report["notes"][-1]
    assert "README.md" not in json.loads((out / "slimrank.json").read_text())["files"]
    assert not list(tmp_path.glob("out.*"))


def test_the_origin_of_a_hub_model(monkeypatch):
    asked = []
    stated = "---\nlicense: mit\nlicense_link: x\ntags: [a]\n---\nhello"
    monkeypatch.setattr(origin.ModelCard, "load", lambda name: asked.append(name) or ModelCard(stated))
    assert origin_of("org/name") == {
        "name": "org/name", "hub_id": "org/name", "license": {"license": "mit", "license_link": "x"},
        "language": [],
    }  # fmt: skip
    assert asked == ["org/name"]


@pytest.mark.parametrize("trouble", [OSError, ValueError, yaml.YAMLError])
def test_a_card_that_cannot_be_read_states_nothing(monkeypatch, trouble):
    def fails(_):
        raise trouble

    monkeypatch.setattr(origin.ModelCard, "load", fails)
    assert origin_of("org/name") == {"name": "org/name", "hub_id": "org/name", "license": {}, "language": []}


def test_the_origin_of_a_folder(tiny_folder, monkeypatch):
    assert origin_of(tiny_folder) == origin_of(str(tiny_folder)) == {
        "name": str(tiny_folder), "hub_id": None, "license": {}, "language": [],
    }  # fmt: skip
    (tiny_folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n")
    assert origin_of(tiny_folder)["language"] == ["en"]
    assert origin_of(tiny_folder)["license"] == {"license": "apache-2.0"}
    monkeypatch.chdir(tiny_folder.parent)
    assert origin_of(tiny_folder.name)["hub_id"] is None


def test_the_origin_of_a_loaded_model(monkeypatch):
    model = tiny_model()
    assert origin_of(model) == {"name": "LlamaForCausalLM", "hub_id": None, "license": {}, "language": []}
    monkeypatch.setattr(origin.ModelCard, "load", lambda name: ModelCard("---\nlicense: mit\n---\n"))
    monkeypatch.setattr(origin, "try_to_load_from_cache", lambda name, file: f"/cache/{name}/{file}")
    model.config.name_or_path = "org/name"
    assert origin_of(model)["hub_id"] == "org/name"
    monkeypatch.setattr(origin, "try_to_load_from_cache", lambda name, file: None)
    assert origin_of(model)["hub_id"] is None
    monkeypatch.undo()
    model.config.name_or_path = "/no/such/folder"
    assert origin_of(model) == {"name": "/no/such/folder", "hub_id": None, "license": {}, "language": []}
