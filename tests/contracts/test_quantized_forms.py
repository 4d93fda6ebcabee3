"""What every form of few bits keeps: exact sizes, numbers that come back from disk, and little lost for its inputs."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from helpers import VOCABULARY, tiny_model
from observed import random
from slimrank.checkpoint.save import mark_model
from slimrank.errors import RecipeError
from slimrank.layers.base import CompressedLinear, compressed_layers, import_neighbours
from slimrank.layers.forms import layer_form
from slimrank.layers.quantized import QuantizedLinear, quantized_layers
from slimrank.layers.quantized_forms import BASES
from slimrank.layers.transforms import found_transforms
from slimrank.linalg.lowrank import solve
from slimrank.linalg.regression import Regression

pytest.importorskip("compressed_tensors", reason="the extra 'quant' is not installed")

NAMES = [
    "dense:int4-g8",
    "dense:int2-sym",
    "pair:int5-g8",
    "pair:int4-g8/int8",
    "pivot:int8-g8",
    "pivot:int4-g8/int6-sym",
    "residual:int3-g8/int8",
    "residual:int2/float",
]
SHAPES = [(16, 32, 8), (32, 16, 8), (16, 16, 8)]
TEXT = torch.randint(VOCABULARY - 3, (2, 12), generator=torch.Generator().manual_seed(0))


import_neighbours()


def test_every_base_is_tried():
    assert {name.partition(":")[0] for name in NAMES} == BASES.keys()


def problem_of(m, n, seed=0):
    """Least squares towards a weight whose spectrum falls, on correlated inputs."""
    x = random(300, n, seed=seed) @ (random(n, n, seed=seed + 1) / n**0.5 + torch.eye(n, dtype=torch.float64))
    u, s, v = torch.linalg.svd(random(m, n, seed=seed + 2), full_matrices=False)
    weight = u * (s * 0.6 ** torch.arange(len(s), dtype=torch.float64)) @ v
    return Regression.of(x, x @ weight.t()), weight


def start_of(form, problem, weight, rank, dtype=torch.float32):
    """The layer as it is before rounding."""
    if form.base in ("dense", "residual"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype)
        layer.weight.data = weight.to(dtype)
        return layer
    a, b = solve(weight, problem.metric()).factors(weight, rank)
    return layer_form(form.base).build(a, b, None, dtype)


def fitted(name, m, n, rank, dtype=torch.float32, seed=0):
    form, (problem, weight) = layer_form(name), problem_of(m, n, seed)
    start = start_of(form, problem, weight, rank, dtype)
    return form, problem, start, form.fit(problem, start, rank, dtype)


def lost(problem, layer):
    return problem.loss(layer.weight.detach().double()) / problem.energy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m, n, rank", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_the_size_is_what_the_form_says(name, m, n, rank, dtype):
    form, _, _, layer = fitted(name, m, n, rank, dtype)
    held = sum(8 * tensor.numel() * tensor.element_size() for tensor in layer.state_dict().values())
    assert held == form.bits(m, n, rank, 8 * dtype.itemsize) + 8 * form.index_bytes(m, n)
    assert len(layer.state_dict()) <= 1 + form.more_tensors(1)
    assert form.fits(m, n, rank)
    assert form.stored(m, n, rank) == sum(part.rows * part.columns for part in form.parts(m, n, rank))


@pytest.mark.parametrize("m, n, rank", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_it_answers_like_its_weight_and_like_a_dense_layer(name, m, n, rank):
    _, _, _, layer = fitted(name, m, n, rank, torch.float64)
    x = random(3, 2, n, seed=5)
    expected = x @ layer.weight.detach().t()
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
    if isinstance(layer, CompressedLinear):
        torch.testing.assert_close(layer.to_dense()(x), expected, rtol=1e-9, atol=1e-9)
        a, b = layer.factors()
        torch.testing.assert_close(b @ a, layer.weight.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("m, n, rank", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_fitting_loses_less_than_rounding_to_the_nearest(name, m, n, rank):
    form, problem, start, layer = fitted(name, m, n, rank)
    if form.base == "residual":  # there is nothing to round but the weight
        plain = layer_form(f"dense:{form.first}").nearest(start, torch.float32)
    else:
        plain = form.nearest(start, torch.float32)
    assert lost(problem, layer) < lost(problem, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("m, n, rank", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_its_state_makes_the_same_layer_again(name, m, n, rank, dtype):
    form, _, _, layer = fitted(name, m, n, rank, dtype)
    empty = form.empty(m, n, rank, dtype)
    assert empty.state_dict().keys() == layer.state_dict().keys()
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty.weight, layer.weight)
    again = copy.deepcopy(empty)
    assert all(torch.equal(tensor, layer.state_dict()[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_more_bits_lose_less_and_cost_more(name):
    base = name.partition(":")[0]
    found = []
    for bits in (4, 6, 8):
        form, problem, _, layer = fitted(f"{base}:int{bits}-g8/int8", 16, 32, 8)
        found.append((form.bits(16, 32, 8, 16), -lost(problem, layer)))
    assert found == sorted(found)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("pair", "pivot"))])
def test_the_second_part_makes_up_for_the_first(name):
    """With the second part not rounded, the layer answers least squares on what the first part gives."""
    form, problem, _, layer = fitted(name.partition("/")[0] + "/float", 16, 32, 8, torch.float64)
    a, b = layer.factors()
    left = (problem.cross - b @ a @ problem.gram) @ a.t()
    free = left if form.base == "pair" else left[layer.order.long().argsort()[layer.rank :]]
    assert float(free.abs().max()) < 1e-8 * float(problem.cross.abs().max())


def test_a_residual_pair_lowers_the_error():
    plain = lost(*[fitted("dense:int3-g8", 32, 32, 8)[i] for i in (1, 3)])
    errors = [lost(*[fitted("residual:int3-g8/int8", 32, 32, rank)[i] for i in (1, 3)]) for rank in (2, 8, 16)]
    assert [plain, *errors] == sorted([plain, *errors], reverse=True)


@pytest.mark.parametrize("name", ["pear:int4", "pivot:int9", "pair:int4-g64/nf4", "dense:four", "int4-g64:dense"])
def test_names_that_are_no_forms_are_refused(name):
    with pytest.raises(RecipeError, match=r"not a form that can be quantised|form '.*': "):
        layer_form(name)


def model_of(name):
    """A tiny model in which every projection is of a form, rounded to the nearest where no inputs are needed."""
    model, form = tiny_model(), layer_form(name)
    for path, layer in [(p, m) for p, m in model.named_modules() if p.endswith("_proj")]:
        problem, _ = problem_of(layer.out_features, layer.in_features)
        problem = Regression(problem.gram, layer.weight.detach().double() @ problem.gram)
        start = start_of(form, problem, layer.weight.detach().double(), 8)
        model.set_submodule(path, form.fit(problem, start, 8, torch.float32))
    mark_model(model)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=TEXT).logits


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_them_saves_and_loads(name, tmp_path):
    model = model_of(name)
    model.save_pretrained(tmp_path / "m")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(loaded), logits(model))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    if config["model_type"] == "slimrank":
        assert {path: layer.scheme for path, layer in quantized_layers(loaded).items()} == {
            path: layer.scheme for path, layer in quantized_layers(model).items()
        }
        loaded.save_pretrained(tmp_path / "again")
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))
    else:  # one of its own architecture, which needs no slimrank
        assert name == "dense:int2-sym"
        assert not list((tmp_path / "m").glob("*.py"))


@pytest.mark.parametrize("name", ["pair:int5-g8", "residual:int3-g8/int8"])
def test_compressed_tensors_reads_the_same_numbers(name, tmp_path):
    """The library itself unpacks what is stored, by what the configuration says."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    model = model_of(name)
    model.save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    config, tensors = QuantizationConfig.model_validate(about), load_file(tmp_path / "model.safetensors")
    compressor = BaseCompressor.get_value_from_registry(config.format)
    groups = [(path, group) for group in config.config_groups.values() for path in group.targets]
    assert {path for path, _ in groups} == quantized_layers(model).keys()
    for path, group in groups:
        stored = {key.removeprefix(f"{path}."): t for key, t in tensors.items() if key.startswith(f"{path}.")}
        weight = compressor.decompress(stored, group)["weight"]
        assert torch.equal(weight, model.get_submodule(path).weight)


@pytest.mark.parametrize("name", NAMES)
def test_all_changes_can_be_undone(name):
    model = model_of(name)
    expected = logits(model)
    for transform, _ in reversed(found_transforms(model)):
        transform.undo(model)
    assert not compressed_layers(model)
    assert not quantized_layers(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_a_layer_refuses_groups_that_do_not_divide_it():
    with pytest.raises(ValueError, match="groups of 5 do not divide 16 columns"):
        QuantizedLinear(16, 8, layer_form("dense:int4-g5").first)
