"""Layers of the same inputs computed together: same outputs, same files, and back."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import slimrank
from helpers import tiny_model
from slimrank.errors import ModelError
from slimrank.layers.base import compressed_layers
from slimrank.layers.packed import is_joined
from slimrank.models import memory_layout
from slimrank.models.packing import pack, unpack

IDS = torch.arange(24).reshape(2, 12) % 40 + 30
OPTIONS = {"keep_ratio": 0.6, "method": "svd", "evaluation": None}


def compressed(form="pivot", name="llama", **options):
    return slimrank.compress(tiny_model(name), form=form, **{**OPTIONS, **options}).model.eval()


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits


@pytest.mark.parametrize("form", ["pair", "pivot"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])  # without and with biases
def test_outputs_are_the_same(form, name):
    model = compressed(form, name)
    before = logits(model)
    layers = len(model.model.layers)
    together = {"q_proj", "k_proj", "v_proj"}
    if form == "pair":
        together |= {"gate_proj", "up_proj"}  # as pivot layers they store columns, and read inputs of their own
    assert pack(model) == (2 * layers if form == "pair" else layers)
    assert torch.allclose(logits(model), before, atol=1e-5)
    assert torch.allclose(logits(model, IDS[:1, :1]), before[:1, :1], atol=1e-5)
    joined = {path.rpartition(".")[2] for path, layer in compressed_layers(model).items() if is_joined(layer)}
    assert joined == together
    unpack(model)
    assert torch.equal(logits(model), before)


def test_first_factors_are_one_product(monkeypatch):
    model = compressed("pair")
    calls = []
    own = torch.nn.functional.linear
    monkeypatch.setattr("slimrank.layers.packed.linear", lambda x, w: calls.append(len(w)) or own(x, w))
    pack(model)
    logits(model)
    layers = compressed_layers(model)
    ranks = {path: layer.rank for path, layer in layers.items()}
    expected = [
        sum(rank for path, rank in ranks.items() if path.startswith(f"model.layers.{block}.") and part in path and
            not path.endswith(("o_proj", "down_proj")))
        for block in range(len(model.model.layers)) for part in ("self_attn", "mlp")
    ]  # fmt: skip
    assert calls[-len(expected) :] == expected


def test_generated_tokens_are_the_same():
    model = compressed()
    before = model.generate(IDS, max_new_tokens=8, do_sample=False, num_beams=2)
    pack(model)
    assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False, num_beams=2), before)


def test_the_same_tensors_are_saved(tmp_path):
    model = compressed()
    model.save_pretrained(tmp_path / "before")
    pack(model)
    model.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("columns", [False, True])
def test_the_order_in_memory_changes_no_output_and_no_file(columns, monkeypatch, tmp_path):
    model = compressed()
    before, names = logits(model), {n: t.shape for n, t in model.state_dict().items()}
    monkeypatch.setattr(memory_layout, "layer_seconds", lambda layers, x: [1.0, 0.9 if columns else 0.98])
    pack(model)
    parts = [layer.interpolation.weight for layer in compressed_layers(model).values()]
    assert all(weight.is_contiguous() != columns for weight in parts if min(weight.shape) > 1)
    assert torch.allclose(logits(model), before, atol=1e-5)
    assert {n: t.shape for n, t in model.state_dict().items()} == names
    model.save_pretrained(tmp_path)
    assert all(tensor.is_contiguous() for tensor in load_file(tmp_path / "model.safetensors").values())
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), before, atol=1e-5)
    unpack(model)
    assert all(p.is_contiguous() for p in model.parameters())
    assert torch.equal(logits(model), before)


def test_other_memory_is_noticed():
    model = compressed()
    pack(model)
    model.to(torch.float64)
    expected = compressed().to(torch.float64)
    assert torch.allclose(logits(model), logits(expected), atol=1e-12)
    layer = next(iter(compressed_layers(model).values()))
    layer.skeleton.weight.data = torch.zeros_like(layer.skeleton.weight)
    assert not torch.allclose(logits(model), logits(expected))


def test_changes_in_place_count():
    model = compressed()
    pack(model)
    layer = next(iter(compressed_layers(model).values()))
    with torch.no_grad():
        layer.skeleton.weight.mul_(2)
    packed = logits(model)
    unpack(model)
    assert torch.allclose(packed, logits(model), atol=1e-5)


def test_gradients_reach_all_weights():
    model = compressed().requires_grad_(True)
    pack(model)
    model(input_ids=IDS).logits.sum().backward()
    assert all(p.grad is not None for layer in compressed_layers(model).values() for p in layer.parameters())


def test_a_copy_computes_by_itself():
    model = compressed()
    pack(model)
    other = copy.deepcopy(model)
    before = logits(model)
    with torch.no_grad():
        for layer in compressed_layers(model).values():
            layer.skeleton.weight.zero_()
    assert torch.allclose(logits(other), before, atol=1e-5)


def test_layers_that_cannot_be_joined_are_left_alone():
    mixed = compressed("pair", ranks={"*layers.0*": "dense"})
    before = logits(mixed)
    assert pack(mixed) == 2 * (len(mixed.model.layers) - 1)
    assert torch.allclose(logits(mixed), before, atol=1e-5)
    hooked = compressed("pair")
    compressed_layers(hooked)["model.layers.0.self_attn.q_proj"].A.register_forward_hook(lambda *_: None)
    pack(hooked)
    assert not is_joined(compressed_layers(hooked)["model.layers.0.self_attn.q_proj"])
    with pytest.raises(ModelError, match="no compressed layers"):
        pack(tiny_model())
