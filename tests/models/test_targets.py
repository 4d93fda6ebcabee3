import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from helpers import CONFIGS, tiny_model
from slimrank.errors import ModelError, RecipeError
from slimrank.layers import LowRankLinear
from slimrank.models.structure import find_blocks, parameters_of
from slimrank.models.targets import find_targets, weight_of

EXPECTED = {  # layers per block, blocks
    "llama": (7, 3), "qwen2": (7, 3), "gpt2": (4, 3), "opt": (6, 3), "gemma": (7, 3), "qwen3_moe": (4, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_all_linears_of_the_blocks_and_nothing_else(name):
    model = tiny_model(name)
    found = find_targets(model)
    per_block, blocks = EXPECTED[name]
    assert len(found) == per_block * blocks
    assert [len(found.in_block(i)) for i in range(blocks)] == [per_block] * blocks
    for target in found:
        module = model.get_submodule(target.path)
        assert weight_of(module).shape == target.shape
        assert target.bias == (module.bias is not None)
        assert not any(word in target.path for word in ("embed", "lm_head", "norm", "wte", "router"))


@pytest.mark.parametrize("name", CONFIGS)
def test_coverage_adds_up_to_the_whole_model(name):
    model = tiny_model(name)
    coverage = find_targets(model).coverage
    assert coverage.total == parameters_of(model)
    assert coverage.targets + sum(coverage.left_out.values()) == coverage.total
    if name == "qwen3_moe":
        banks = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
        assert coverage.left_out["expert banks (3-D, of a class of their own)"] == banks
        assert coverage.of_matrices < 0.5
    else:
        assert coverage.of_matrices == 1.0


def test_the_meta_device_is_enough():
    with torch.device("meta"):
        bones = AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    bones.tie_weights()
    real = find_targets(tiny_model("llama"))
    assert find_targets(bones).targets == real.targets
    assert find_targets(bones).coverage == real.coverage


def test_conv1d_is_transposed_in_place():
    target = find_targets(tiny_model("gpt2")).targets[0]
    assert (target.kind, target.shape, target.bias) == ("conv1d", (96, 32), True)


def test_patterns():
    model = tiny_model()
    only_mlp = find_targets(model, targets=["*.mlp.*"])
    assert {t.path.split(".")[-2] for t in only_mlp} == {"mlp"}
    assert only_mlp.coverage.left_out["left out by pattern"] > 0
    no_first = find_targets(model, ignore=["re:layers\\.0\\."])
    assert {t.block for t in no_first} == {1, 2}
    assert {t.path.split(".")[-1] for t in find_targets(model, targets=["q_proj"])} == {"q_proj"}
    with pytest.raises(RecipeError, match="matches no linear"):
        find_targets(model, ignore=["*.mpl.*"])
    with pytest.raises(ModelError, match="no weight to compress"):
        find_targets(model, ignore=["*"])


def test_tied_weights_count_once():
    model = tiny_model()
    layers = model.model.layers
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    found = find_targets(model)
    tied = next(t for t in found if t.path == "model.layers.0.mlp.up_proj")
    assert tied.ties == ("model.layers.2.mlp.up_proj",)
    assert len(found) == 20
    assert found.coverage.targets + sum(found.coverage.left_out.values()) == parameters_of(model)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.shared_gate = nn.Linear(8, 1)
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Experts(), Experts()])


def test_routers_are_known_by_their_experts():
    found = find_targets(Decoder())
    assert {t.path.split(".")[-2] for t in found} == {"experts"}
    assert found.coverage.left_out["routers"] == 2 * 4 * 8
    assert found.coverage.left_out["too small to factor"] == 2 * 8


class WrappedRouter(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.ModuleDict({"layer": nn.Linear(8, 4)})
        self.input_linear = nn.Linear(8, 12)
        self.bank = nn.Module()
        self.bank.weight = nn.Parameter(torch.zeros(4, 8, 8))
        self.conv1d = nn.Conv1d(12, 12, 4, groups=12)


def test_wrapped_routers_and_convolutions():
    """A router inside a module of its own is one; a linear as wide as a convolution beside it is none."""
    model = nn.Module()
    model.layers = nn.ModuleList([WrappedRouter()])
    found = find_targets(model)
    assert [t.path for t in found] == ["layers.0.input_linear"]
    left_out = found.coverage.left_out
    assert left_out["routers"] == 32
    assert left_out["convolutions"] == 48
    assert left_out["expert banks (3-D, of a class of their own)"] == 256


def test_subclasses_of_linear_count_as_linear():
    class Own(nn.Linear):
        pass

    class Extra(nn.Linear):
        def __init__(self):
            super().__init__(8, 8)
            self.scale = nn.Parameter(torch.ones(8))

    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"own": Own(8, 8), "extra": Extra()})])
    found = find_targets(model)
    assert [t.path for t in found] == ["layers.0.own"]
    assert found.coverage.left_out["linears with parts of their own"] == 64


class Grouped(nn.Linear):
    """A block-diagonal product, as the output projections of DeepSeek-V4."""

    def forward(self, x):
        return torch.einsum("...gn,gmn->...gm", x, self.weight.view(2, -1, self.in_features))


class Normed(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight / self.weight.norm(), self.bias)


class Spelled(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


@pytest.mark.parametrize("kind, taken", [(Grouped, False), (Normed, False), (Spelled, True)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_linear_that_computes_something_of_its_own_is_left_out(kind, taken, device):
    model = tiny_model().to(device)
    for block in model.model.layers:
        block.mlp.up_proj = kind(32, 48, device=device)
    found = find_targets(model)
    assert any(target.path.endswith("up_proj") for target in found) == taken
    left = found.coverage.left_out.get("linears that compute something of their own", 0)
    assert left == (0 if taken else 3 * 32 * 48)
    assert found.coverage.targets + sum(found.coverage.left_out.values()) == parameters_of(model)


def test_no_decoder_blocks():
    with pytest.raises(ModelError, match="no list of decoder blocks"):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))


def test_a_compressed_model_is_not_compressed_again():
    model = tiny_model()
    model.model.layers[0].mlp.up_proj = LowRankLinear(32, 48, 4)
    with pytest.raises(ModelError, match="already compressed"):
        find_targets(model)
