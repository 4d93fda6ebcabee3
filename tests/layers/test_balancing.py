"""Compressed layers as balanced pairs, and back."""

import pytest
import torch

import slimrank
from helpers import tiny_model
from slimrank.layers.balancing import BalancedPairs, balanced, put_pairs
from slimrank.layers.base import compressed_layers, share_tensors
from slimrank.layers.low_rank import LowRankLinear

DRAW = torch.Generator().manual_seed(0)
IDS = torch.arange(24)[None] % 40 + 30


def compressed(form, name="llama"):
    return slimrank.compress(tiny_model(name), keep_ratio=0.6, method="svd", form=form, evaluation=None).model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_balanced_factors_have_the_same_product():
    a, b = (torch.randn(*shape, generator=DRAW, dtype=torch.float64) for shape in ((5, 9), (7, 5)))
    c, d = balanced(a, b)
    assert torch.allclose(d @ c, b @ a)
    assert torch.allclose(c @ c.t(), d.t() @ d)
    assert torch.allclose(c @ c.t(), (c @ c.t()).diagonal().diag())


@pytest.mark.parametrize("form", ["pair", "pivot"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])  # without and with biases
def test_the_model_computes_the_same_as_pairs(form, name):
    model = compressed(form, name)
    before = logits(model)
    pairs = BalancedPairs(model)
    assert all(type(layer) is LowRankLinear for layer in compressed_layers(model).values())
    for layer in compressed_layers(model).values():
        a, b = layer.factors()
        assert torch.allclose(a @ a.t(), b.t() @ b, atol=1e-5)
    assert torch.allclose(logits(model), before, atol=1e-5)
    pairs.end(kept=True)
    assert torch.allclose(logits(model), before, atol=1e-5)


@pytest.mark.parametrize("form", ["pair", "pivot"])
def test_what_pairs_learn_is_kept_at_the_same_size(form):
    model = compressed(form, "qwen2")
    before, entries = state(model), {p: layer.entry() for p, layer in compressed_layers(model).items()}
    pairs = BalancedPairs(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=DRAW)
    learnt = logits(model)
    pairs.end(kept=True)
    assert torch.allclose(logits(model), learnt, atol=1e-4)
    assert {p: layer.entry() for p, layer in compressed_layers(model).items()} == entries
    assert {n: (t.shape, t.dtype) for n, t in state(model).items()} == {
        n: (t.shape, t.dtype) for n, t in before.items()
    }


@pytest.mark.parametrize("form", ["pair", "pivot"])
def test_nothing_changes_if_it_is_not_kept(form):
    model = compressed(form)
    before = state(model)
    pairs = BalancedPairs(model)
    with torch.no_grad():
        for layer in compressed_layers(model).values():
            layer.A.weight.mul_(2)
    pairs.end(kept=False)
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_layers_within_a_path_are_changed():
    model = compressed("pivot")
    BalancedPairs(model, "model.layers.1.")
    kinds = {path.split(".")[2]: type(layer) for path, layer in compressed_layers(model).items()}
    assert kinds["1"] is LowRankLinear
    assert kinds["0"] is not LowRankLinear


def test_layers_that_share_weights_stay_as_they_are():
    model = compressed("pair")
    layers = compressed_layers(model)
    first, second = (f"model.layers.{number}.mlp.gate_proj" for number in (0, 1))
    share_tensors(layers[second], layers[first], ("A.weight",))
    before = state(model)
    BalancedPairs(model)
    after = state(model)
    changed = {name.rpartition(".A.")[0] for name in before if not torch.equal(before[name], after[name])}
    assert not {first, second} & changed
    assert "model.layers.0.mlp.up_proj" in changed


def test_pairs_may_stand_for_pivot_layers_for_good():
    model = compressed("pivot")
    before, count = logits(model), len(compressed_layers(model))
    assert put_pairs(model) == count
    assert {type(layer) for layer in compressed_layers(model).values()} == {LowRankLinear}
    assert torch.allclose(logits(model), before, atol=1e-5)
    assert put_pairs(model) == 0
