"""What every form of layers keeps: little or nothing is lost, sizes are exact, layers save, load, compile and train.

The last form is none of slimrank's: it is registered from outside, in a file of less than 40 lines.
"""

import copy
import json
import subprocess
import sys

import outside
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import slimrank
from helpers import VOCABULARY, byte_tokenizer, tiny_model
from slimrank.budget.rank_plan import RankPlan
from slimrank.checkpoint.save import mark_model, replace_linears
from slimrank.errors import RecipeError
from slimrank.layers.base import compressed_layers, import_neighbours, layer_class, load_tensors
from slimrank.layers.forms import layer_form
from slimrank.layers.layer_form import FORMS

import_neighbours()
IDS = [*sorted(FORMS), outside.FORM]
LOST = {"pair": 1e-12, "pivot": 1e-11}  # relatively, in float64; all other forms may round
ROUNDED = 0.05
SHAPES = [(10, 14, 4), (14, 10, 4), (9, 9, 3)]
TEXT = torch.randint(VOCABULARY - 3, (2, 12), generator=torch.Generator().manual_seed(0))
PROJECTIONS = ("q_proj", "down_proj")


@pytest.fixture(scope="module", autouse=True)
def _outside():
    with outside.registered():
        yield


def factors(m, n, rank, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((rank, n), (m, rank), (m,)))


def built(form, m=10, n=14, rank=4, dtype=torch.float64, biased=True):
    a, b, bias = factors(m, n, rank)
    return layer_form(form).build(a, b, bias if biased else None, dtype)


def logits(model):
    with torch.no_grad():
        return model(input_ids=TEXT).logits


def model_of(form, name="llama", tied=False):
    """A tiny model in which some layers are of a form."""
    model = tiny_model(name)
    blocks = model.model.layers
    if tied:
        blocks[1].mlp.down_proj.weight = blocks[0].mlp.down_proj.weight
    for path in [path for path, _ in model.named_modules() if path.endswith(PROJECTIONS)]:
        if not isinstance(model.get_submodule(path), nn.Linear):
            continue  # tied to one before
        weight = model.get_submodule(path).weight.detach().double()
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        ties = ["model.layers.1.mlp.down_proj"] if tied and path == "model.layers.0.mlp.down_proj" else []
        replace_linears(model, [((path, *ties), u[:, :8] * s[:8])], v[:8], form)
    mark_model(model)
    return model


@pytest.mark.parametrize("m, n, rank", SHAPES)
@pytest.mark.parametrize("form", IDS)
def test_the_product_of_the_factors_is_kept(form, m, n, rank):
    a, b, bias = factors(m, n, rank)
    layer = layer_form(form).build(a, b, bias, torch.float64)
    found_a, found_b = layer.factors()
    assert (found_a.shape, found_b.shape) == ((rank, n), (m, rank))
    assert found_a.dtype == found_b.dtype == torch.float64
    assert not any(factor.requires_grad for factor in (found_a, found_b))
    product = b @ a
    assert float((found_b @ found_a - product).norm() / product.norm()) < LOST.get(form, ROUNDED)
    x = torch.randn(3, 2, n, dtype=torch.float64)
    expected = x @ (found_b @ found_a).t() + bias
    for output in (layer(x), layer.to_dense()(x), x @ layer.weight.t() + layer.bias):
        torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    latent = layer.latent(x)
    assert latent is None or latent.shape == (3, 2, rank)
    if latent is not None:  # all outputs come from it
        small = torch.linalg.lstsq(latent.reshape(-1, rank), (expected - bias).reshape(-1, m)).solution
        torch.testing.assert_close(latent @ small, expected - bias, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m, n, rank", SHAPES)
@pytest.mark.parametrize("form", IDS)
def test_the_size_is_what_the_form_says(form, m, n, rank, dtype):
    made, width = layer_form(form), 8 * dtype.itemsize
    state = built(form, m, n, rank, dtype, biased=False).state_dict()
    held = sum(8 * tensor.numel() * tensor.element_size() for tensor in state.values())
    assert held == made.bits(m, n, rank, width) + 8 * made.index_bytes(m, n)
    assert len(state) <= 1 + made.more_tensors(1)
    assert made.parameters(m, n, "dense") == m * n
    assert made.bits(m, n, "dense", width) == m * n * width


@pytest.mark.parametrize("width", [8, 16, 32])
@pytest.mark.parametrize("m, n", [(5, 7), (7, 5), (1, 9), (64, 48)])
@pytest.mark.parametrize("form", IDS)
def test_costs_rise_with_the_rank(form, m, n, width):
    made = layer_form(form)
    bits = [made.bits(m, n, rank, width) for rank in range(1, min(m, n) + 1)]
    assert all(type(cost) is int for cost in bits)
    assert bits == sorted(set(bits))
    smaller = [rank for rank, cost in enumerate(bits, 1) if cost < m * n * width]
    assert made.largest_rank(m, n, width) == max(smaller, default=0)
    for limit in (bits[0] - 1, bits[0], bits[-1] // 2, bits[-1]):
        within = [rank for rank, cost in enumerate(bits, 1) if cost <= limit]
        assert max(0, made.within(m, n, limit, width)) == max(within, default=0)
    rank = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(made.bits(m, n, rank, width) * 1.0, rank)[0] > 0  # soft ranks


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("form", IDS)
def test_an_entry_makes_an_empty_layer_of_the_same_kind(form, biased):
    layer = built(form, dtype=torch.float32, biased=biased)
    entry = json.loads(json.dumps(layer.entry()))
    empty = layer_class(entry["kind"]).from_entry(entry, device="meta", dtype=torch.float32)
    assert type(empty) is type(layer)
    assert empty.entry() == entry
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in layer.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in empty.state_dict().items()} == shapes
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(2, 14)
    assert torch.equal(empty(x), layer(x))
    assert {*layer.tied_names(), *layer.shared_names()} <= layer.state_dict().keys()
    assert bool(layer.shared_names()) == layer_form(form).shares


@pytest.mark.parametrize("form", IDS)
def test_b_and_the_bias_can_be_changed(form):
    layer, other = built(form), copy.deepcopy(built(form))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    a, b = layer.factors()
    layer.set_b(b)
    torch.testing.assert_close(layer.factors()[1], b, rtol=1e-9, atol=1e-9)
    layer.set_b(2 * b)
    assert float((layer.factors()[1] @ a - b @ a).norm()) > 1e-3
    layer.set_bias(torch.arange(10.0, dtype=torch.float64))
    assert torch.equal(layer.bias, torch.arange(10.0, dtype=torch.float64))
    load_tensors(layer, before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    layer.set_bias(None)
    assert layer.bias is None


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", IDS)
def test_a_model_of_them_saves_and_loads(form, tied, tmp_path):
    model = model_of(form, tied=tied)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(loaded), logits(model))
    names = [
        name for path, layer in compressed_layers(model).items() for name in (f"{path}.{n}" for n in layer.state_dict())
    ]
    stored = {name for name in load_file(tmp_path / "model.safetensors") if name in names}
    shared = len(compressed_layers(model)["model.layers.0.mlp.down_proj"].tied_names()) if tied else 0
    assert len(stored) == len(names) - shared
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.isfinite(logits(half)).all()


@pytest.mark.parametrize("form", IDS)
def test_it_compiles_whole(form):
    layer, x = built(form, dtype=torch.float32), torch.randn(2, 5, 14)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize("form", IDS)
def test_adapters_of_the_parts_train_and_merge(form):
    """In float64, so that merging is exact but for the last digits. A form without linear parts takes none."""
    from peft import LoraConfig, get_peft_model

    model = model_of(form).double()
    layers = compressed_layers(model)
    parts = {name for layer in layers.values() for name, m in layer.named_children() if isinstance(m, nn.Linear)}
    if not parts:
        pytest.skip("it has no linear parts")
    plain = logits(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=sorted(parts), r=2, init_lora_weights=False))
    changed = logits(adapted)
    assert float((changed - plain).abs().max()) > 1e-3
    adapted(input_ids=TEXT, labels=TEXT).loss.backward()
    torch.testing.assert_close(logits(adapted.merge_and_unload()), changed, rtol=1e-8, atol=1e-8)


def test_a_form_from_outside_is_small():
    for name in (outside.FORM, outside.TRANSFORM):
        code = (outside.FOLDER / f"{name}.py").read_text().split('"""', 2)[2].split("\n")
        assert sum(bool(line.strip()) for line in code) < 40


def planned(model, form, rank=6):
    targets = slimrank.find_targets(model)
    shapes, width = {t.path: t.shape for t in targets}, {t.path: 32 for t in targets}
    bits = sum(layer_form(form).bits(*shape, rank, 32) for shape in shapes.values())
    return RankPlan.build(dict.fromkeys(shapes, rank), shapes, "by hand", bits, cost_model=form, widths=width)


def test_a_form_from_outside_is_planned_compressed_and_reported(tmp_path):
    plan = planned(tiny_model(), outside.FORM)
    assert plan.bits == plan.budget
    assert {target.width for target in plan.targets.values()} == {32}  # its numbers are not as wide as the weight's
    result = slimrank.compress(
        tiny_model(), byte_tokenizer(), plan=plan, method="svd", evaluation=None, out=tmp_path / "out"
    )
    assert {layer.kind for layer in compressed_layers(result.model).values()} == {outside.FORM}
    assert RankPlan.load(tmp_path / "out" / "plan.json") == plan
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["size"]["stored_as"] == outside.FORM
    assert report["size"]["bytes_after"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    config = json.loads((tmp_path / "out" / "config.json").read_text())["slimrank"]
    assert config["format"] == 5
    assert {about["kind"] for about in config["layers"].values()} == {outside.FORM}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(result.model))


@pytest.mark.parametrize("refine", [None, "update"])
def test_a_recipe_names_a_form_from_outside(refine, tmp_path):
    """Its numbers are half as wide as those of the dense weights, so that ranks are larger within the same bytes."""
    options = {"method": "svd_llm", "refine": refine, "samples": 2, "search_samples": 2, "seq_len": 16}
    options |= {"evaluation": None, "max_bytes": 60_000, "rank_multiple": 2}
    wide = slimrank.compress(tiny_model().bfloat16(), byte_tokenizer(), **options).plan
    told = slimrank.compress(
        tiny_model().bfloat16(), byte_tokenizer(), form=outside.FORM, out=tmp_path / "out", **options
    )
    assert {layer.kind for layer in compressed_layers(told.model).values()} == {outside.FORM}
    assert sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")) <= options["max_bytes"]
    ranks, narrow = wide.factored(), told.plan.factored()
    assert sum(narrow.values()) > 1.5 * sum(ranks.get(path, 0) for path in narrow)
    with pytest.raises(RecipeError, match="no such form; known: eight_bits, pair, pivot, remapped, got 'pears'"):
        slimrank.Recipe.make({"form": "pears"})


def test_a_budget_in_a_plan_of_such_a_form_is_kept(tmp_path):
    plan = planned(tiny_model(), outside.FORM)
    over = plan.model_copy(update={"budget": plan.budget - 1})
    with pytest.raises(slimrank.SlimrankError, match=r"stores .* bits, over its budget"):
        slimrank.compress(tiny_model(), byte_tokenizer(), plan=over, method="svd", evaluation=None)


def test_plans_of_one_width_are_written_as_ever():
    plan = planned(tiny_model(), "pair")
    assert plan.budget == plan.parameters
    assert set(next(iter(plan.model_dump()["targets"].values()))) == {"rank", "shape", "shares"}
    with pytest.raises(RecipeError, match="no factor form 'piivot'"):
        layer_form("piivot")


def test_the_code_of_a_form_from_outside_is_saved_and_run_without_slimrank(tmp_path):
    model = model_of(outside.FORM)
    model.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / f"{outside.FORM}.py").is_file()
    torch.save(logits(model), tmp_path / "expected.pt")
    program = f"""
import sys
sys.modules["slimrank"] = None
import torch
from transformers import AutoModelForCausalLM
ids = torch.tensor({TEXT.tolist()})
for folder in ("m", "again"):
    model = AutoModelForCausalLM.from_pretrained(f"{tmp_path}/{{folder}}", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, torch.load("{tmp_path}/expected.pt"))
    model.save_pretrained("{tmp_path}/again")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_code_that_cannot_stand_alone_is_left_out_with_a_warning(tmp_path, monkeypatch):
    text = (outside.FOLDER / f"{outside.FORM}.py").read_text().replace('"eight_bits"', '"needy"')
    (tmp_path / "needy.py").write_text(f"from slimrank.errors import SlimrankError\n{text}")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("needy")
    model = model_of("needy")
    with pytest.warns(UserWarning, match=r"'needy' is not saved with the model.*imports other parts of slimrank"):
        model.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m" / "needy.py").exists()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), logits(model))
    from slimrank.layers.base import KINDS

    KINDS.pop("needy"), FORMS.pop("needy")
    with pytest.raises(ValueError, match="layers of the kind 'needy' are not known: import the package"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")
