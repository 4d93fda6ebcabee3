"""An engine's layer reads its tensors by name and shard, in any order, and computes what the model's layers compute."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from serving.served_models import PLANS, planned_model, save
from slimrank.errors import ModelError
from slimrank.layers.low_rank import LowRankLinear
from slimrank.serving.compute import Packed, Product, Shard
from slimrank.serving.plan import ServedPlan, paths_of
from slimrank.serving.sharding import Span
from slimrank.serving.slots import Slots

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
NAMES = [name for name in PLANS if not name.startswith("family") and name != "split"]


def slots_of(model, plan, prefix, split=False):
    paths = paths_of(prefix, FUSED if not split else {}, plan.splits)
    modules = [model.get_submodule(path) for path in paths]
    shapes = [(module.out_features, module.in_features) for module in modules]
    stored = [plan.stored(path, shape, torch.float32) for path, shape in zip(paths, shapes, strict=True)]
    spans = [Span()] * len(paths)
    return Slots(stored, spans, [f"part_{i}." if split else "" for i in range(len(paths))]), modules


def read_all(slots, state, skip=""):
    """As an engine reads: by the names of the layers that were joined, the last ones first."""
    shards = "qkv" if len(slots.stored) == 3 else range(len(slots.stored))
    for stored, shard in reversed(list(zip(slots.stored, shards, strict=True))):
        for name in stored.tensors:
            if f"{stored.path}.{name}" != skip:
                alone = len(slots.stored) == 1
                slots.read(name, state[f"{stored.path}.{name}"], None if alone else shard)


@pytest.fixture(scope="module", params=NAMES)
def case(request, tmp_path_factory):
    folder = save(request.param, tmp_path_factory.mktemp("plan"))
    model = planned_model(request.param)
    return model, load_file(folder / "model.safetensors"), getattr(model.config, "slimrank", None)


def test_layers_compute_what_the_model_computes(case):
    model, state, about = case
    plan, lent = ServedPlan.read(about), {}
    for block in range(3):
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            slots, modules = slots_of(model, plan, f"model.layers.{block}.{name}")
            slots.parameters()
            read_all(slots, state)
            packed = slots.packed(lent, plan.lenders, Product)
            x = torch.randn(2, 3, modules[0].in_features)
            biases = [module.bias if module.bias is not None else torch.zeros(()) for module in modules]
            wanted = [module(x) - bias for module, bias in zip(modules, biases, strict=True)]
            assert torch.allclose(packed(x), torch.cat(wanted, -1), atol=1e-4)


def test_every_layer_of_the_plan_is_found_by_its_path(case):
    about = case[2]
    plan = ServedPlan.read(about)
    found = set()
    for block in range(3):
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            found.update(paths_of(f"model.layers.{block}.{name}", FUSED, plan.splits))
    assert plan.paths <= found


def pair_case():
    model = planned_model("pair")
    plan = ServedPlan.read(model.config.slimrank)
    slots, _ = slots_of(model, plan, "model.layers.0.self_attn.qkv_proj")
    slots.parameters()
    return slots, model.state_dict()


def test_a_tensor_that_is_missing_ends_it():
    slots, state = pair_case()
    read_all(slots, state, skip="model.layers.0.self_attn.k_proj.B.weight")
    with pytest.raises(ModelError, match=r"lacks 1 tensors of .*q_proj', the first 'B.weight \(1\)'"):
        slots.shards({})


def test_a_tensor_of_another_shape_or_shard_ends_it():
    slots, state = pair_case()
    a = state["model.layers.0.self_attn.q_proj.A.weight"]
    with pytest.raises(ModelError, match=r"shard k\) is \(32, 128\); expected is \(48, 128\)"):
        slots.read("A.weight", a, "k")
    with pytest.raises(ModelError, match="expected is none"):
        slots.read("A.weight", a, None)  # three shards have one


def test_a_split_layer_is_found_by_its_parts():
    model = planned_model("split")
    plan = ServedPlan.read(model.config.slimrank)
    slots, modules = slots_of(model, plan, "model.layers.0.self_attn.qkv_proj", split=True)
    state, prefix = model.state_dict(), "model.layers.0.self_attn.qkv_proj."
    assert set(slots.parameters()) == {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    for name in slots.names:
        slots.read(name, state[prefix + name])
    x = torch.randn(2, 128)
    assert torch.allclose(slots.packed({}, set(), Product)(x), torch.cat([m(x) for m in modules], -1), atol=1e-5)


def test_a_shared_factor_is_multiplied_once():
    A = torch.randn(4, 8)
    layers = [LowRankLinear.from_factors(A, torch.randn(6, 4)) for _ in range(3)]
    packed = Packed([Shard("pair", "", {"A.weight": A, "B.weight": layer.B.weight}) for layer in layers])
    assert packed.first.weight.shape == (4, 8)
    x = torch.randn(5, 8)
    assert torch.allclose(packed(x), torch.cat([layer(x) for layer in layers], -1), atol=1e-5)


def test_all_that_reads_the_input_is_one_product():
    made = []

    def make(weight):
        made.append(tuple(weight.shape))
        return Product(weight)

    dense, pair = nn.Linear(8, 6, bias=False), LowRankLinear(8, 6, 2)
    Packed([Shard("dense", "", dense.state_dict()), Shard("pair", "", pair.state_dict())], make)
    assert made == [(6, 2), (6 + 2, 8)] or made == [(6 + 2, 8), (6, 2)]
