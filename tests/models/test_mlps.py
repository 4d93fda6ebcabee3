"""MLPs are found by trying which rows and columns belong to one hidden unit."""

import pytest
import torch
from torch import nn

from architectures import ARCHITECTURES, random_model
from helpers import tiny_model
from slimrank.layers.dense import weight_of
from slimrank.layers.experts import fuse, unfuse
from slimrank.models.mlps import find_mlps, rows_of_units
from slimrank.narrowing.layers import keep_units, set_weight
from slimrank.narrowing.widths import width_fields

IDS = torch.randint(0, 90, (2, 24), generator=torch.Generator().manual_seed(0))
FOUND = {  # family -> MLPs, field and value
    "llama": (2, {"intermediate_size": 48}),
    "phi3": (2, {"intermediate_size": 48}),
    "gpt2": (2, {"n_inner": 64}),
    "opt": (2, {"ffn_dim": 64}),
    "falcon": (2, {"ffn_hidden_size": 128}),
    "mixtral": (8, {"intermediate_size": 48}),
    "gpt_oss": (8, {"intermediate_size": 48}),
    "deepseek_v3": (6, {"intermediate_size": 48, "moe_intermediate_size": 24}),
    "llama4": (6, {"intermediate_size": 48, "intermediate_size_mlp": 48}),
}


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits.double()


@pytest.mark.parametrize("name", FOUND)
def test_the_field_of_the_configuration_is_found(name):
    model = random_model(name)
    unfuse(model)
    fields = width_fields(model, find_mlps(model))
    assert {field.name: field.value for field in fields} == FOUND[name][1]
    assert sum(len(field.mlps) for field in fields) == FOUND[name][0]


def test_the_default_width_of_gpt2_is_found_though_no_field_states_it():
    model = tiny_model("gpt2", n_inner=None)
    assert [(field.name, field.value) for field in width_fields(model, find_mlps(model))] == [("n_inner", 128)]


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "mamba"])
def test_relabelled_hidden_units_change_nothing(name):
    model = random_model(name)
    before = logits(model)
    unfuse(model)
    for mlp in find_mlps(model):
        order = torch.randperm(mlp.width, generator=torch.Generator().manual_seed(mlp.block))
        keep_units(model, mlp.makers, mlp.width, order)
        reader = model.get_submodule(mlp.reader)
        set_weight(reader, weight_of(reader)[:, order])
    fuse(model)
    assert torch.allclose(logits(model), before, atol=1e-4 * float(before.abs().max()))


def test_attention_is_not_an_mlp():
    model = random_model("llama", num_key_value_heads=4)  # all widths of attention are equal
    assert not any("self_attn" in path for mlp in find_mlps(model) for path in mlp.paths)


def test_a_norm_over_the_hidden_units_is_in_the_way():
    class Normed(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

        def forward(self, x):
            h = nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
            return self.down_proj(h / h.norm(dim=-1, keepdim=True))

    model = random_model("llama")
    for layer in model.model.layers:
        layer.mlp = Normed(layer.mlp)
    assert find_mlps(model) == []


def test_a_scale_for_every_hidden_unit_is_in_the_way():
    class Scaled(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.up_proj, self.down_proj = mlp.up_proj, mlp.down_proj
            self.scale = nn.Parameter(torch.ones(48))

        def forward(self, x):
            return self.down_proj(self.scale * self.up_proj(x).relu())

    model = random_model("llama")
    for layer in model.model.layers:
        layer.mlp = Scaled(layer.mlp)
    assert find_mlps(model) == []


def test_tied_layers_stay_as_they_are():
    model = random_model("llama")
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    assert find_mlps(model) == []


def test_rows_of_fused_layers():
    units = torch.tensor([0, 2])
    assert rows_of_units(units, 4, "whole").tolist() == [0, 2]
    assert rows_of_units(units, 4, "halves").tolist() == [0, 2, 4, 6]
    assert rows_of_units(units, 4, "pairs").tolist() == [0, 1, 4, 5]
