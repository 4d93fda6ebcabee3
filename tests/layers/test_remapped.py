"""The remapped form: 8 bits where both factors have numbers, 16 where only one has; its numbers come back as stored."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import slimrank
from helpers import VOCABULARY, byte_tokenizer, check_without_slimrank, save_tiny, tiny_model
from slimrank.errors import RecipeError
from slimrank.layers.base import compressed_layers
from slimrank.layers.forms import layer_form
from slimrank.layers.remapped import RemappedLinear

SHAPES = [(10, 14), (14, 10), (12, 12)]
TEXT = torch.randint(VOCABULARY - 3, (2, 12), generator=torch.Generator().manual_seed(0))
QUICK = {"method": "svd", "evaluation": None, "samples": 4, "seq_len": 32}


def drawn(m, n, rank, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((rank, n), (m, rank)))


def by_hand(weight, rank, dtype):
    """The stored weight, number by number, from its singular vectors."""
    m, n = weight.shape
    short = min(m, n)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    made = torch.zeros_like(weight)
    for i in range(rank):
        column, row = u[:, i] * s[i].sqrt(), v[i] * s[i].sqrt()
        for vector in (column, row):
            scale = float((vector[:short].abs().max() / 127).to(dtype))
            for j in range(len(vector)):
                vector[j] = round(float(vector[j]) / scale) * scale if j < short else float(vector[j].to(dtype))
        made += column[:, None] * row
    return made


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_vectors_are_rounded_as_the_paper_says(m, n, dtype):
    a, b = drawn(m, n, 4)
    layer = layer_form("remapped").build(a, b, None, dtype)
    found_a, found_b = layer.factors()
    expected = by_hand(b @ a, 4, dtype)
    assert float((found_b @ found_a - expected).abs().max()) < 1e-10
    error = float((expected - b @ a).norm() / (b @ a).norm())
    assert 1e-3 < error < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_rank_r_takes_about_r_times_the_longer_side_of_16_bits(m, n, dtype):
    rank = 4
    layer = layer_form("remapped").build(*drawn(m, n, rank), None, dtype)
    held = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    scales = 2 * 2 * rank
    assert held == 2 * max(m, n) * rank + scales
    assert layer_form("remapped").bits(m, n, rank, 16) == 8 * held
    assert layer_form("remapped").parameters(m, n, rank) == sum(t.numel() for t in layer.state_dict().values())


def test_a_vector_of_zeros_or_of_tiny_numbers_is_kept():
    a, b = torch.zeros(2, 6), torch.zeros(5, 2)
    a[0, 0], b[0, 0] = 1e-4, 1e-4
    for dtype in (torch.float16, torch.float32):
        layer = layer_form("remapped").build(a, b, None, dtype)
        assert torch.isfinite(layer.weight).all()
        product = layer.factors()[1] @ layer.factors()[0]
        assert float((product - (b @ a).double()).abs().max()) < 1e-9


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_what_lies_on_the_grid_stays(m, n):
    layer = layer_form("remapped").build(*drawn(m, n, 4), None, torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    a, b = layer.factors()
    layer.set_a(a)
    layer.set_b(b)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_ranks_beyond_the_shape_are_refused():
    with pytest.raises(ValueError, match="rank must be 1 to 5, got 6"):
        RemappedLinear(8, 5, 6)


# in a run -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits(model):
    return model(input_ids=TEXT).logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_compressed_model_loads_bit_for_bit_with_slimrank_and_without(tmp_path, dtype):
    wanted = {**QUICK, "form": "remapped", "keep_ratio": 0.7, "dtype": str(dtype).removeprefix("torch.")}
    result = slimrank.compress(save_tiny(tmp_path / "m"), out=tmp_path / "out", **wanted)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for path, layer in compressed_layers(result.model).items():
        assert layer.kind == "remapped"
        for name, tensor in layer.state_dict().items():
            assert torch.equal(stored[f"{path}.{name}"], tensor)
            assert stored[f"{path}.{name}"].dtype == (torch.int8 if "codes" in name else dtype)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.state_dict().items() if name in stored)
    assert torch.equal(logits(loaded), logits(result.model))
    check_without_slimrank(tmp_path / "out", TEXT, logits(loaded))


def test_keep_counts_bits_and_plan_tells_the_bytes_of_the_file(tmp_path):
    folder = save_tiny(tmp_path / "m")
    wanted = {**QUICK, "form": "remapped", "keep_ratio": 0.7, "dtype": "bfloat16"}
    foretold = slimrank.preview(folder, **wanted)["size"]
    result = slimrank.compress(folder, out=tmp_path / "out", **wanted)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    linears = compressed_layers(result.model).keys()
    held = sum(t.numel() * t.element_size() for name, t in stored.items() if name.rpartition(".")[0] in linears)
    dense = sum(2 * m * n for m, n in (t.shape for t in result.plan.targets.values()))
    whole = sum(2 * m * n for m, n in (t.shape for t in result.plan.targets.values() if t.rank == "dense"))
    assert 0.6 * dense < held + whole <= 0.7 * dense
    assert foretold["linears_bytes"] == result.report["size"]["linears_bytes"] == held + whole
    ranks = slimrank.compress(folder, **{**wanted, "form": "pair"}).plan.factored()
    assert sum(result.plan.factored().values()) > 1.2 * sum(ranks.values())  # more rank in the same bytes


@pytest.mark.parametrize("refine", [None, "regress"])
def test_ranks_chosen_for_pairs_are_stored_in_fewer_bytes(tmp_path, refine):
    options = {**QUICK, "method": "svd_llm", "keep_ratio": 0.6, "refine": refine, "search_samples": 2}
    pairs = slimrank.compress(tiny_model().bfloat16(), byte_tokenizer(), **options)
    found = slimrank.compress(tiny_model().bfloat16(), byte_tokenizer(), store_form="remapped", **options)
    assert found.plan.factored() == pairs.plan.factored()
    assert found.report["size"]["linears_bytes"] < 0.8 * pairs.report["size"]["linears_bytes"]
    change = (logits(found.model) - logits(pairs.model)).float().norm() / logits(pairs.model).float().norm()
    assert change < 0.05


def test_methods_that_share_factors_are_refused():
    with pytest.raises(RecipeError, match="those of the form 'remapped' have none to share"):
        slimrank.compress(
            tiny_model(), byte_tokenizer(), form="remapped", keep_ratio=0.7, **{**QUICK, "method": "basis_sharing"}
        )


def test_other_rounding_on_top_is_refused():
    with pytest.raises(RecipeError, match="'remapped' in 'remapped:int4-g8' is not a form that can be quantised"):
        slimrank.compress(tiny_model(), byte_tokenizer(), form="remapped", keep_ratio=0.7, quantize="int4-g8", **QUICK)


def test_the_configuration_names_the_kind(tmp_path):
    slimrank.compress(tiny_model(), byte_tokenizer(), form="remapped", keep_ratio=0.7, out=tmp_path / "out", **QUICK)
    about = json.loads((tmp_path / "out" / "config.json").read_text())["slimrank"]
    assert about["format"] == 5
    assert {layer["kind"] for layer in about["layers"].values()} == {"remapped"}
    assert (tmp_path / "out" / "remapped.py").is_file()
