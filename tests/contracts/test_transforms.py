"""What every transform keeps: the model computes the same with and without it, and is saved and loaded with it.

The last transform is none of slimrank's: it is registered from outside, in a file of less than 40 lines.
"""

import json

import outside
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import slimrank
from architectures import random_model
from helpers import byte_tokenizer, check_without_slimrank
from slimrank.checkpoint.save import mark_model, replace_linears
from slimrank.layers.base import import_neighbours
from slimrank.layers.experts import unfuse
from slimrank.layers.forms import layer_form
from slimrank.layers.split import split_linears
from slimrank.layers.transforms import (
    TRANSFORMS,
    described,
    found_transforms,
    saved_transforms,
    transform_of,
)

import_neighbours()
KINDS = [*sorted(TRANSFORMS), outside.TRANSFORM]
TEXT = torch.arange(20).reshape(2, 10)


TOGETHER = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"


def with_factors(model):
    for path in (*TOGETHER, "model.layers.1.mlp.up_proj"):
        u, s, v = torch.linalg.svd(model.get_submodule(path).weight.detach().double(), full_matrices=False)
        replace_linears(model, [((path,), u[:, :8] * s[:8])], v[:8])


def with_integers(model):
    for path in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"):
        made = layer_form("dense:int5-g8").nearest(model.get_submodule(path), torch.float32)
        model.set_submodule(path, made.eval())


def packed(model):
    with_factors(model)
    transform_of("packed").apply(model, {"groups": [list(TOGETHER)], "columns": {"float32": [f"{TOGETHER[0]}.B"]}})


EXAMPLES = {  # kind -> a family, and what changes a model of it
    "experts": ("mixtral", unfuse),
    "split": ("phi3", lambda model: split_linears(model, {"model.layers.1.mlp.gate_up_proj": [30, 66]})),
    "factors": ("llama", with_factors),
    "packed": ("llama", packed),
    "quantized": ("llama", with_integers),
    "latent_cache": ("llama", lambda model: transform_of("latent_cache").apply(model, {"int8": True})),
    outside.TRANSFORM: ("llama", lambda model: transform_of(outside.TRANSFORM).apply(model, {"paths": ["model.norm"]})),
}
BENEATH = {"packed": with_factors}  # kind -> what a model is changed by before


@pytest.fixture(scope="module", autouse=True)
def _outside():
    with outside.registered():
        yield


def logits(model):
    with torch.no_grad():
        return model(input_ids=TEXT, use_cache=False).logits


def changed(kind):
    name, change = EXAMPLES[kind]
    model = random_model(name)
    change(model)
    return model


def unchanged(kind):
    model = random_model(EXAMPLES[kind][0])
    BENEATH.get(kind, lambda model: None)(model)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_undoing_it_changes_nothing_but_modules(kind):
    model, native = changed(kind), unchanged(kind)
    expected = logits(model)
    assert transform_of(kind).entry(native) is None
    assert transform_of(kind).entry(model)
    assert found_transforms(model) != found_transforms(native)
    transform_of(kind).undo(model)
    assert transform_of(kind).entry(model) is None
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    shapes = {name: tensor.shape for name, tensor in native.state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes


@pytest.mark.parametrize("kind", KINDS)
def test_its_entry_makes_it_again(kind):
    model, other = changed(kind), unchanged(kind)
    entry = json.loads(json.dumps(transform_of(kind).entry(model)))
    transform_of(kind).apply(other, entry)
    assert transform_of(kind).entry(other) == entry
    other.load_state_dict(model.state_dict(), assign=True)
    transform_of(kind).loaded(other, entry)
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_it_changed_saves_and_loads(kind, tmp_path):
    model = changed(kind)
    mark_model(model)
    model.save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())["slimrank"]
    assert [each["kind"] for each in about["transforms"]][-1] == kind
    assert len(about["transforms"]) == 1 + (kind in BENEATH)
    assert about["format"] == transform_of(kind).format(transform_of(kind).entry(model))
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(loaded), logits(model))
    assert found_transforms(loaded) == found_transforms(model)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_it_needs_are_never_random(kind, tmp_path):
    model = changed(kind)
    mark_model(model)
    model.save_pretrained(tmp_path)
    starts = tuple(transform_of(kind).needed(transform_of(kind).entry(model)))
    tensors = load_file(tmp_path / "model.safetensors")
    gone = sorted(name for name in tensors if name.startswith(starts))[:1]
    if not gone:
        pytest.skip("it needs none but those of the native model")
    del tensors[gone[0]]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 weights.*{gone[0]}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_changes_are_listed_in_the_order_in_which_they_are_made():
    model = random_model("mixtral")
    unfuse(model)
    split_linears(model, {"model.layers.0.mlp.experts.up.0": [48, 48]})
    path = "model.layers.0.mlp.experts.up.0.part_1"
    replace_linears(model, [((path,), torch.randn(48, 3))], torch.randn(3, 32))
    transform_of(outside.TRANSFORM).apply(model, {"paths": ["model.norm"]})
    about = json.loads(json.dumps(described(found_transforms(model))))
    assert [each["kind"] for each in about["transforms"]] == ["experts", "split", "factors", outside.TRANSFORM]
    assert about["format"] == 5
    other = random_model("mixtral")
    for transform, entry in saved_transforms(about):
        transform.apply(other, entry)
    assert other.state_dict().keys() == model.state_dict().keys()


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="changed by 'folded', which is not known: import the package"):
        list(saved_transforms({"transforms": [{"kind": "folded"}]}))


def test_a_transform_from_outside_goes_through_compress_and_loads_without_slimrank(tmp_path):
    model = changed(outside.TRANSFORM)
    result = slimrank.compress(
        model, byte_tokenizer(), keep_ratio=0.6, method="svd", evaluation=None, seq_len=16, out=tmp_path / "out"
    )
    about = json.loads((tmp_path / "out" / "config.json").read_text())["slimrank"]
    assert about["transforms"] == [{"kind": "factors"}, {"kind": outside.TRANSFORM, "paths": ["model.norm"]}]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == result.report
    (section,) = result.report["sections"]
    assert section["rows"] == [[outside.TRANSFORM, '{"paths": ["model.norm"]}']]
    assert outside.TRANSFORM in (tmp_path / "out" / "report.html").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(result.model))
    check_without_slimrank(tmp_path / "out", TEXT, logits(loaded))
