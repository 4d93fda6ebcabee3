"""Stages of a block's layers, and running a block only as far as some of them."""

import pytest
import torch
from torch import nn

from helpers import tiny_model
from slimrank.models.reading_order import calls_of, reading_order, run_until_read
from slimrank.models.targets import find_targets

IDS = torch.arange(24).reshape(2, 12)


def stages_of(name):
    model = tiny_model(name)
    targets = [t.path for t in find_targets(model).in_block(1)]
    layers = {path: model.get_submodule(path) for path in targets}
    with torch.no_grad():
        found = reading_order(layers, lambda: model(IDS))
    assert sorted(path for stage in found for path in stage) == sorted(targets)
    assert not any(layer._forward_pre_hooks for layer in layers.values())
    return [{path.split(".", 3)[-1] for path in stage} for stage in found]


def test_llama():
    attention, mlp = "self_attn.", "mlp."
    assert stages_of("llama") == [
        {attention + "q_proj", attention + "k_proj", attention + "v_proj"},
        {attention + "o_proj"},
        {mlp + "gate_proj", mlp + "up_proj"},
        {mlp + "down_proj"},
    ]


def test_gpt2():
    assert stages_of("gpt2") == [{"attn.c_attn"}, {"attn.c_proj"}, {"mlp.c_fc"}, {"mlp.c_proj"}]


class Experts(nn.Module):
    """Two of three experts are used; `w2` answers to what `w1` gives."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(4, 4), "w2": nn.Linear(4, 4)}) for _ in range(3))
        self.never = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)

    def forward(self, x):
        for expert in self.experts[:2]:
            part = x.clone()
            x = x + expert["w2"](expert["w1"](part))
        return self.last(x)

    def layers(self):
        return {path: layer for path, layer in self.named_modules() if isinstance(layer, nn.Linear)}


def test_experts_are_in_one_stage_and_what_is_not_reached_comes_last():
    block = Experts()
    assert reading_order(block.layers(), lambda: block(torch.ones(1, 4))) == [
        ["experts.0.w1", "experts.1.w1", "experts.2.w1"],
        ["experts.0.w2", "experts.1.w2", "experts.2.w2"],
        ["last"],
        ["never"],
    ]


def test_hooks_are_gone_after_an_error():
    block = Experts()

    def fail():
        block(torch.ones(1, 4))
        raise RuntimeError("on purpose")

    for run in (lambda: reading_order(block.layers(), fail), lambda: run_until_read([block.never], fail)):
        with pytest.raises(RuntimeError, match="on purpose"):
            run()
        assert not any(layer._forward_pre_hooks for layer in block.layers().values())


@pytest.mark.parametrize("until, called", [(["a"], "a"), (["b"], "ab"), (["a", "b"], "ab"), (["c", "a"], "abc")])
def test_nothing_runs_after_the_last_layer_is_read(until, called):
    layers = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abcd"})
    seen = []
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda module, args, name=name: seen.append(name))
    run_until_read([layers[name] for name in until], lambda: nn.Sequential(*layers.values())(torch.ones(1, 4)))
    assert "".join(seen) == called


def test_layers_that_are_called_again():
    layers, seen = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"}), []

    def run():
        for name in "abacab":
            seen.append(name)
            layers[name](torch.ones(1, 4))

    assert calls_of({name: layers[name] for name in "ac"}, run) == {"a": 3, "c": 1}
    seen.clear()
    run_until_read([layers["a"], layers["a"], layers["b"]], run)
    assert "".join(seen) == "aba"
    assert calls_of({"b": layers["b"]}, list) == {"b": 1}


def test_without_any_layer_everything_runs():
    seen = []
    run_until_read([], lambda: seen.append(1))
    assert seen == [1]
