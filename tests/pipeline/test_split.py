"""Fused layers taken as several: the same model, saved and loaded in parts, whole again where nothing was cut."""

import functools
import json

import pytest
import torch
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

import slimrank
from architectures import random_model
from helpers import byte_tokenizer, check_without_slimrank, text
from slimrank.cli.app import main
from slimrank.errors import ModelError, RecipeError
from slimrank.layers.base import compressed_layers
from slimrank.layers.dense import weight_of
from slimrank.layers.split import join_linears, split_linears, splits_of
from slimrank.models.fused_layers import sizes_of_parts
from slimrank.pipeline import find_plan

IDS = torch.arange(20).reshape(2, 10)
SPLITS = {
    "phi3": {"qkv_proj": "qkv", "gate_up_proj": 2},
    "gpt2": {"c_attn": 3},  # Conv1D, with a bias
    "glm": {"gate_up_proj": [30, 66]},
    "gpt_neox": {"query_key_value": 3},
}
OUTPUTS = {"phi3": {(32, 16, 16), (48, 48)}, "gpt2": {(32,) * 3}, "glm": {(30, 66)}, "gpt_neox": {(32,) * 3}}
WAYS = {"forwards": {"method": "svd_llm"}, "everything": {}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("split")


def compress(name, **options):
    model = random_model(name) if isinstance(name, str) else name
    given = {"keep_ratio": 0.6, "calibration": (text(400),), "samples": 4, "seq_len": 24, "search_samples": 2}
    return slimrank.compress(model, byte_tokenizer(), **{**given, "evaluation": None, **options})


@functools.cache
def compressed(name, way, folder):
    return compress(name, split=SPLITS[name], out=folder / f"{name}-{way}", **WAYS[way])


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("name", SPLITS)
def test_parts_are_ranges_of_outputs(name):
    """Each part against rows of the whole weight; and the whole model computes the same."""
    model, dense = random_model(name).double(), random_model(name).double()
    sizes = sizes_of_parts(model, SPLITS[name])
    assert {tuple(some) for some in sizes.values()} == OUTPUTS[name]
    split_linears(model, sizes)
    assert splits_of(model).keys() == sizes.keys()
    x = torch.randn(3, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for path, split in splits_of(model).items():
        old = dense.get_submodule(path)
        torch.testing.assert_close(split(x), linear(x, weight_of(old), old.bias), rtol=1e-12, atol=1e-12)
        first = next(split.children())
        assert torch.equal(first.weight, weight_of(old)[: split.sizes[0]])
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-10, atol=1e-10)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in dense.parameters())


@pytest.mark.parametrize("name", SPLITS)
def test_joining_undoes_splitting(name):
    model, same = random_model(name), random_model(name).state_dict()
    split_linears(model, sizes_of_parts(model, SPLITS[name]))
    join_linears(model)
    assert model.state_dict().keys() == same.keys()
    assert all(torch.equal(tensor, same[key]) for key, tensor in model.state_dict().items())
    assert splits_of(model) == {}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SPLITS)
def test_compresses_saves_and_loads(name, way, folder):
    result = compressed(name, way, folder)
    coverage, whole = result.report["coverage"], compress(name, method="svd").report["coverage"]
    assert (coverage["targets"], coverage["of_matrices"]) == (whole["targets"], whole["of_matrices"])
    parts = [path for path in result.plan.targets if ".part_" in path]
    assert len(parts) == 2 * sum(len(some) for some in OUTPUTS[name])
    assert any(".part_" in path for path in compressed_layers(result.model))
    loaded, info = AutoModelForCausalLM.from_pretrained(result.out, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert type(loaded) is type(random_model(name))
    torch.testing.assert_close(logits(loaded), logits(result.model), rtol=1e-4, atol=1e-4)
    about = json.loads((result.out / "config.json").read_text())["slimrank"]
    assert about["format"] == 4
    assert {tuple(some) for some in about["split"].values()} == OUTPUTS[name]
    loaded.save_pretrained(result.out / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(result.out / "again")), logits(loaded))


def test_loads_without_slimrank(folder):
    result = compressed("phi3", "forwards", folder)
    expected = logits(AutoModelForCausalLM.from_pretrained(result.out))
    check_without_slimrank(result.out, IDS, expected)


def test_parts_have_ranks_of_their_own():
    """What one part is worth does not bind the others; patterns reach them."""
    result = compress("phi3", split=SPLITS["phi3"], method="svd_llm", ranks={"qkv_proj.part_0": 5, "part_2": "dense"})
    ranks = {path: target.rank for path, target in result.plan.targets.items() if "qkv_proj" in path}
    assert {rank for path, rank in ranks.items() if path.endswith("part_0")} == {5}
    assert {rank for path, rank in ranks.items() if path.endswith("part_2")} == {"dense"}


def test_parts_are_less_wrong_than_the_whole():
    """Where one part is of low rank by itself, its budget goes to the other."""
    options = {"targets": ("*gate_up_proj*",), "method": "svd", "allocation": "spectrum", "keep_ratio": 0.6}
    dense = with_low_rank_gates()
    whole, parts = (compress(with_low_rank_gates(), split=s, **options).model for s in ({}, {"gate_up_proj": 2}))
    lost = [sum(lost_in(m, dense, i) for i in range(2)) for m in (whole, parts)]
    assert lost[1] < 0.9 * lost[0]


def with_low_rank_gates():
    model = random_model("phi3")
    for block in model.model.layers:
        weight = block.mlp.gate_up_proj.weight.data
        weight[:48] = weight[:48, :2] @ weight[:2, :]
    return model


def lost_in(model, dense, block):
    old = dense.model.layers[block].mlp.gate_up_proj.weight
    with torch.no_grad():
        return float((model.model.layers[block].mlp.gate_up_proj(torch.eye(32)) - old.t()).norm())


def test_an_interrupted_run_goes_on_only_with_the_same_parts(tmp_path):
    options = {"method": "svd_llm", "run_dir": tmp_path}
    compress("phi3", split={"gate_up_proj": 2}, **options)
    compress("phi3", split={"gate_up_proj": 2}, **{**options, "keep_ratio": 0.4})
    with pytest.raises(slimrank.SlimrankError, match="run"):
        compress("phi3", **options)


def test_a_model_that_was_not_cut_is_whole(tmp_path):
    model, same = random_model("phi3"), random_model("phi3")
    with pytest.raises(slimrank.SlimrankError, match="matches no linear layer"):
        compress(model, split={"qkv_proj": "qkv"}, targets=("nothing",), method="svd")
    assert model.state_dict().keys() == same.state_dict().keys()
    assert torch.equal(logits(model), logits(same))


@pytest.mark.parametrize(
    "name, split, message",
    [
        ("phi3", {"nothing": 2}, "'nothing' of 'split' matches no linear layer"),
        ("phi3", {"gate_up_proj": 7}, "are not 7 equal parts"),
        ("phi3", {"gate_up_proj": [40, 40]}, r"40 \+ 40 = 80 outputs do not make up .*, which has 96"),
        ("phi3", {"gate_up_proj": "qkv"}, "do not make up"),
        ("phi3", {"gate_up_proj": 1}, "split.gate_up_proj: give a number of equal parts"),
        ("phi3", {"gate_up_proj": [96]}, "split.gate_up_proj: give a number of equal parts"),
        ("phi3", {"gate_up_proj": "halves"}, "split.gate_up_proj: give a number of equal parts"),
        ("phi3", {"gate_up_proj": [0, 96]}, "split.gate_up_proj: give a number of equal parts"),
        ("phi3", {"re:(": 2}, "is not a regular expression"),
    ],
)
def test_mistakes(name, split, message):
    with pytest.raises(RecipeError, match=message):
        compress(name, split=split, method="svd")


def test_a_weight_in_several_places_is_not_split():
    model = random_model("phi3")
    model.model.layers[1].mlp.gate_up_proj.weight = model.model.layers[0].mlp.gate_up_proj.weight
    with pytest.raises(RecipeError, match="is tied to other layers"):
        compress(model, split={"gate_up_proj": 2}, method="svd")


def test_on_the_command_line(tmp_path, capsys):
    model = tmp_path / "phi3"
    random_model("phi3").save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    (tmp_path / "text.txt").write_text(text(400))
    flags = ["--split", "qkv_proj=qkv", "--split", "gate_up_proj=[48, 48]", "--keep", "0.6", "--method", "svd"]

    def shown(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *flags, "--json"])
        assert ended.value.code == 0
        return json.loads(capsys.readouterr().out)

    planned = shown("plan", str(model))
    done = shown("compress", str(model), "--no-eval", "--out", str(tmp_path / "out"))
    assert planned["plan"] == json.loads((tmp_path / "out" / "plan.json").read_text())
    assert sum(".part_" in row["path"] for row in done["targets"]) == 10


def test_experts_in_parts_are_whole_again_too():
    """Parts are joined first, or the experts they belong to could not be fused."""
    model, same = random_model("mixtral"), random_model("mixtral").state_dict()
    options = {"keep_ratio": 0.6, "calibration": (text(400),), "samples": 4, "seq_len": 24, "allocation": "spectrum"}
    plan, _ = find_plan(model, byte_tokenizer(), method="svd_llm", split={"up.*": 2}, evaluation=None, **options)
    assert any(".up.0.part_1" in path for path in plan.targets)
    assert model.state_dict().keys() == same.keys()
    assert all(torch.equal(tensor, same[key]) for key, tensor in model.state_dict().items())


def test_a_compressed_model_that_is_refused_stays_as_it_is(folder, tmp_path):
    result = compress("phi3", method="svd", ignore=("gate_up_proj",), out=tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(result.out)
    with pytest.raises(ModelError, match="already compressed"):
        compress(model, split={"gate_up_proj": 2}, method="svd")
    model.save_pretrained(tmp_path / "again")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert torch.equal(logits(again), logits(model))


def test_a_preview_names_parts_of_several_layers_apart(tmp_path):
    random_model("gpt2").save_pretrained(tmp_path)
    kinds = slimrank.preview(tmp_path, keep_ratio=0.6, method="svd", split={"c_attn": 3, "c_fc": 2})["kinds"]
    names = [row["name"] for row in kinds]
    assert {"c_attn.part_0", "c_attn.part_1", "part_2", "c_fc.part_0", "c_fc.part_1"} <= set(names)
    assert len(set(names)) == len(names)
