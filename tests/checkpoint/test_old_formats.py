"""Models that slimrank 0.1 saved, in each format that it knew, load, compute what they did, and are saved again.

The files under tests/data are not to be made anew: they are what older versions wrote, without the copied code.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import slimrank
from slimrank.checkpoint.save import mark_model

DATA = Path(__file__).parents[1] / "data"
FORMATS = [1, 2, 3, 4]


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.fixture(params=FORMATS)
def old(request):
    return DATA / f"format-{request.param}"


def test_an_old_model_computes_what_it_did(old):
    assert slimrank.__all__  # importing slimrank is what registers the loader
    expected = load_file(old / "logits.safetensors")
    model, info = AutoModelForCausalLM.from_pretrained(old, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(logits_of(model, expected["ids"]), expected["logits"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("marked", [False, True])
def test_an_old_model_is_saved_again_with_the_same_tensors(old, marked, tmp_path):
    """`marked`: its configuration is made anew from its layers, as that of a fresh model."""
    expected = load_file(old / "logits.safetensors")
    model = AutoModelForCausalLM.from_pretrained(old)
    if marked:
        mark_model(model)
    model.save_pretrained(tmp_path)
    before, after = load_file(old / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(again, expected["ids"]), logits_of(model, expected["ids"]))


def test_what_older_versions_read_stays_in_the_file(old, tmp_path):
    """Formats 1 to 4 keep their number and their keys, so that older versions of slimrank read them."""
    model = AutoModelForCausalLM.from_pretrained(old)
    mark_model(model)
    model.save_pretrained(tmp_path)
    before, after = (json.loads((folder / "config.json").read_text())["slimrank"] for folder in (old, tmp_path))
    assert before["format"] == after["format"]
    assert before.keys() <= after.keys()
    for key in before.keys() - {"layers"}:
        assert before[key] == after[key]
    assert before["layers"].keys() == after["layers"].keys()
    assert all(about.items() <= after["layers"][path].items() for path, about in before["layers"].items())


def test_an_old_model_takes_new_code_along(old, tmp_path):
    shutil.copytree(old, tmp_path / "old")
    AutoModelForCausalLM.from_pretrained(tmp_path / "old").save_pretrained(tmp_path / "new")
    assert (tmp_path / "new" / "modeling_slimrank.py").is_file()
