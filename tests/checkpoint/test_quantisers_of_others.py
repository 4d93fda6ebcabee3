"""Saved models under the quantisers of other libraries: loaded through them, saved, loaded again."""

import json
import warnings

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import slimrank
from helpers import byte_tokenizer, check_without_slimrank, tiny_model
from slimrank.checkpoint.few_bits_slimrank import nearest_bits
from slimrank.checkpoint.save import mark_model, replace_linears
from slimrank.layers.base import compressed_layers
from slimrank.layers.dense import weight_of

# bitsandbytes 0.50 calls what torch 2.13 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

IDS = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
RANK = 64  # nf4 on some processors needs rows and columns of whole blocks, of 32 and 64
LLAMA = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
GPT2 = {"n_embd": 128, "n_inner": 256}
NAMES = ("q_proj", "up_proj", "down_proj", "c_fc", "c_proj")
PARTS = {"pair": {"A", "B"}, "pivot": {"skeleton", "interpolation"}, "mixed": {"A", "B", "skeleton", "interpolation"}}
FORMS = list(PARTS)


def torchao_int8():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def bitsandbytes_int8():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def bitsandbytes_nf4():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


# what makes the configuration, the kind of tensor that shows it, and how far logits may move
QUANTISERS = {
    "torchao int8": (torchao_int8, "Int8Tensor", 0.1),
    "bitsandbytes int8": (bitsandbytes_int8, "Int8Params", 0.1),
    "bitsandbytes nf4": (bitsandbytes_nf4, "Params4bit", 0.6),
}


def factored(form, name="llama", **sizes):
    """A model whose layers of some names are pairs, pivots, or both and dense ones."""
    model = tiny_model(name, **(sizes or LLAMA))
    paths = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in NAMES]
    kinds = ["pair", "pivot", "dense"] if form == "mixed" else [form]
    for number, path in enumerate(paths):
        kind = kinds[number % len(kinds)]
        U, S, V = torch.linalg.svd(weight_of(model.get_submodule(path)).double(), full_matrices=False)
        if kind != "dense":
            replace_linears(model, [((path,), U[:, :RANK] * S[:RANK])], V[:RANK], kind)
    mark_model(model)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved model of each form, with its logits."""
    made = {}
    for form in FORMS:
        model, folder = factored(form), tmp_path_factory.mktemp(form)
        model.save_pretrained(folder)
        made[form] = folder, logits(model)
    return made


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", QUANTISERS)
@pytest.mark.filterwarnings("ignore:.* rounds .* layers of the kind 'pivot'")
def test_loaded_saved_and_loaded_again(name, form, folders, tmp_path):
    """It is saved before it computes: bitsandbytes 0.50 repacks nf4 then, and cannot undo that on some processors."""
    make, tensor, far = QUANTISERS[name]
    folder, expected = folders[form]
    model = load(folder, quantization_config=make())
    model.save_pretrained(tmp_path)
    found = logits(model)
    assert 0 < distance(found, expected) < far
    linears = {path: type(module.weight).__name__ for path, module in model.named_modules() if is_linear(module)}
    assert {path.rpartition(".")[2] for path in linears if ".mlp.up_proj." in path} <= PARTS[form]
    assert PARTS[form] <= {path.rpartition(".")[2] for path in linears}
    assert {kind for path, kind in linears.items() if path != "lm_head"} == {tensor}
    again, info = load(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(again), found)
    assert type(again) is type(model)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == name.split()[0]
    assert "quantization_config" not in config["base_config"]


def is_linear(module):
    return isinstance(module, nn.Linear)


@pytest.mark.parametrize("name", QUANTISERS)
def test_models_that_look_at_weights_while_they_are_read(name, tmp_path):
    """GPT-2 initialises `c_proj.weight`, which a compressed layer makes of its parts."""
    make, tensor, far = QUANTISERS[name]
    model = factored("pair", "gpt2", **GPT2)
    model.save_pretrained(tmp_path / "saved")
    loaded = load(tmp_path / "saved", quantization_config=make())
    loaded.save_pretrained(tmp_path / "again")
    found = logits(loaded)
    assert 0 < distance(found, logits(model)) < far
    assert {type(layer.B.weight).__name__ for layer in compressed_layers(loaded).values()} == {tensor}
    assert torch.equal(logits(load(tmp_path / "again")), found)


def test_a_quantised_model_loads_without_slimrank(folders, tmp_path):
    make, _, _ = QUANTISERS["torchao int8"]
    model = load(folders["pivot"][0], quantization_config=make())
    model.save_pretrained(tmp_path)
    check_without_slimrank(tmp_path, IDS, logits(model))


# without these libraries -----------------------------------------------------------------------------------------


class RoundingConfig(QuantizationConfigMixin):
    """What a user gives to the quantiser of this test."""

    def __init__(self, bits, skip=()):
        self.quant_method, self.bits, self.skip = "rounding", bits, skip


class Rounded(nn.Module):
    """Integers, and a scale for each row."""

    def __init__(self, linear, bits):
        super().__init__()
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        codes = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight, self.bias = nn.Parameter(codes, requires_grad=False), linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


class Rounding(HfQuantizer):
    """Rounds every linear layer to the nearest, as those of other libraries do."""

    is_trainable = False

    def is_serializable(self):
        return False

    def _process_model_after_weight_loading(self, model, **kwargs):
        about = self.quantization_config
        for path, module in list(model.named_modules()):
            if is_linear(module) and not path.endswith(("lm_head", *about.skip)):
                model.set_submodule(path, Rounded(module, about.bits))
        return model


@pytest.fixture
def quantiser(monkeypatch):
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "rounding", Rounding)


def test_pivot_layers_of_few_bits_are_warned_of(quantiser, folders):
    folder, expected = folders["mixed"]
    pivots = [layer for layer in compressed_layers(load(folder)).values() if layer.kind == "pivot"]
    message = f"rounding rounds {len(pivots)} layers of the kind 'pivot' to the nearest in 4 bits.*--quantize int4-g64"
    with pytest.warns(UserWarning, match=message) as found:
        model = load(folder, quantization_config=RoundingConfig(4))
    assert {warning.filename for warning in found} == {__file__}
    assert distance(logits(model), expected) > 0.1


@pytest.mark.parametrize(
    "form, config",
    [
        ("pivot", RoundingConfig(8)),
        ("pivot", RoundingConfig(4, skip=("skeleton", "interpolation"))),
        ("pair", RoundingConfig(4)),
    ],
    ids=["8 bits", "pivots skipped", "pairs"],
)
def test_others_are_not_warned_of(form, config, quantiser, folders):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folders[form][0], quantization_config=config)


def test_parts_of_others_are_not_multiplied(quantiser, folders):
    """They hold packed numbers, or integers, so the product would be a wrong weight."""
    for form in ("pair", "pivot"):
        model = load(folders[form][0], quantization_config=RoundingConfig(8))
        layer = next(iter(compressed_layers(model).values()))
        assert layer.weight.shape == (layer.out_features, layer.in_features)
        assert layer.weight.is_meta
        for numbers in (layer.factors, layer.to_dense):
            with pytest.raises(ValueError, match="load the model without quantization_config"):
                numbers()


def test_weights_that_slimrank_quantised_are_not_quantised_again(quantiser, tmp_path):
    model = tiny_model(**LLAMA)
    options = {
        "method": "svd",
        "allocation": "uniform",
        "quantize": "int8",
        "quantize_options": {"rounding": "nearest"},
    }
    slimrank.compress(model, byte_tokenizer(), keep_ratio=1.0, evaluation=None, seq_len=16, **options)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"slimrank has quantised the weights of .* already") as refused:
        load(tmp_path, quantization_config=RoundingConfig(8))
    assert str(tmp_path) in str(refused.value)
    assert torch.equal(logits(load(tmp_path)), logits(model))


def torchao(name, **data):
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": name, "_version": 2, "_data": data}}}


INT4 = {"weight_dtype": {"_type": "torch.dtype", "_data": "int4"}, "granularity": {"_data": {"axis": 0}}}


@pytest.mark.parametrize(
    "about, bits",
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, 4),
        ({"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}, 8),
        (torchao("Int4WeightOnlyConfig", group_size=128), 4),
        (torchao("Int8WeightOnlyConfig", group_size=None), 8),
        (torchao("Int8DynamicActivationInt4WeightConfig"), 4),
        (torchao("IntxWeightOnlyConfig", **INT4), 4),
        (torchao("FqnToConfig", a=torchao("Int8WeightOnlyConfig"), b=torchao("Int4WeightOnlyConfig")), 4),
        ({"quant_method": "quanto", "weights": "int2", "activations": "int8"}, 2),
        ({"quant_method": "quanto", "weights": "float8"}, 8),
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 3, "axis": 1}}}, 3),
        ({"quant_method": "higgs", "bits": 4, "group_size": 256}, 4),
        ({"quant_method": "gptq", "bits": 4}, None),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}}, None),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, None),
        ({}, None),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bits_that_a_configuration_rounds_to(about, bits):
    assert nearest_bits(about) == bits
