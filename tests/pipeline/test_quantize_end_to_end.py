"""Compressions that end with integers: what is planned, stored, loaded and resumed, and what is refused."""

import importlib.util
import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import slimrank
from architectures import random_model
from helpers import VOCABULARY, byte_tokenizer, tiny_model
from slimrank.budget.rank_plan import RankPlan
from slimrank.errors import ModelError, PlanError, RecipeError
from slimrank.layers.base import compressed_layers
from slimrank.layers.forms import layer_form
from slimrank.layers.quantized import quantized_layers

pytest.importorskip("compressed_tensors", reason="the extra 'quant' is not installed")

TEXT = torch.randint(VOCABULARY - 3, (2, 12), generator=torch.Generator().manual_seed(0))
SMALL = {"samples": 4, "seq_len": 16, "evaluation": None, "method": "svd_llm"}
compress = partial(slimrank.compress, tokenizer=byte_tokenizer(), **SMALL)


def logits(model):
    with torch.no_grad():
        return model(input_ids=TEXT).logits


def file_bytes(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def mixed_plan(model):
    """Every form of few bits in one plan."""
    forms = ["dense:int4-g8", "pair:int5-g8", "pivot:int4-g8/int8", "residual:int3-g8/int8", "residual:int4/float"]
    shapes = {t.path: t.shape for t in slimrank.find_targets(model)}
    chosen = {path: forms[i % len(forms)] for i, path in enumerate(shapes)}
    ranks = {path: "dense" if form.startswith("dense") else 8 for path, form in chosen.items()}
    widths = dict.fromkeys(shapes, 32)
    return RankPlan.build(ranks, shapes, "by hand", 10**9, widths=widths, forms=chosen)


@pytest.mark.parametrize("form", ["pair", "pivot"])
@pytest.mark.parametrize("quantize", ["int8", "int4-g8", "int6-g8-sym"])
def test_what_is_loaded_is_what_was_compressed(form, quantize, tmp_path):
    result = compress(tiny_model(), keep_ratio=0.8, form=form, quantize=quantize, out=tmp_path / "o")
    assert all(str(layer.scheme) == quantize for layer in quantized_layers(result.model).values())
    assert len(compressed_layers(result.model)) == len(result.plan.factored())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    assert torch.equal(logits(loaded), logits(result.model))
    stored = load_file(tmp_path / "o" / "model.safetensors")
    for path, layer in quantized_layers(loaded).items():
        assert torch.equal(layer.weight, quantized_layers(result.model)[path].weight)
        assert f"{path}.weight_packed" in stored
        assert f"{path}.weight" not in stored
    group = layer_form(f"dense:{quantize}").first.group or 1
    assert all(rank % group == 0 for rank in result.plan.factored().values())


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "gemma3", "phi3", "mixtral"])
def test_any_architecture_is_quantised(architecture, tmp_path):
    result = compress(random_model(architecture), keep_ratio=0.7, quantize="int8", out=tmp_path / "o")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    assert torch.equal(logits(loaded), logits(result.model))
    assert {path for path in result.plan.targets if result.plan.targets[path].is_quantized} == set(result.plan.targets)


@pytest.mark.parametrize("form", ["pair", "pivot"])
@pytest.mark.parametrize("quantize", ["int8", "int4-g8"])
def test_bytes_are_those_of_the_plan_and_within_the_budget(form, quantize, tmp_path):
    options = {"form": form, "quantize": quantize, "max_bytes": 95_000, "rank_multiple": 8, "allocation": "spectrum"}
    result = compress(tiny_model(), out=tmp_path / "o", **options)
    assert file_bytes(tmp_path / "o") <= 95_000
    tensors = sum(t.numel() * t.element_size() for t in load_file(tmp_path / "o" / "model.safetensors").values())
    tiny_model().save_pretrained(tmp_path / "m")
    plan = {"plan": str(tmp_path / "o" / "plan.json"), "form": "pair"} | SMALL
    assert slimrank.preview(tmp_path / "m", **plan)["size"]["bytes_after"] == tensors
    planned = sum(target.bits("pair", 32) for target in result.plan.targets.values())
    held = {path: result.model.get_submodule(path).state_dict() for path in result.plan.targets}
    numbers = sum(
        8 * tensor.numel() * tensor.element_size()
        for state in held.values()
        for name, tensor in state.items()
        if not name.endswith(("weight_shape", "order"))
    )
    assert planned == numbers


def test_a_plan_mixes_all_forms(tmp_path):
    plan = mixed_plan(tiny_model())
    plan.save(tmp_path / "plan.json")
    result = compress(tiny_model(), plan=str(tmp_path / "plan.json"), out=tmp_path / "o")
    assert RankPlan.load(tmp_path / "o" / "plan.json").targets == plan.targets
    kinds = {layer.kind for layer in compressed_layers(result.model).values()}
    assert kinds == {"pair", "pivot", "residual"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    assert torch.equal(logits(loaded), logits(result.model))
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    assert {group["weights"]["num_bits"] for group in groups.values()} == {3, 4, 5, 8}


def test_rounding_is_towards_the_model_before(tmp_path):
    """Many bits change nothing that is seen; few bits lose less by gptq than by rounding to the nearest."""
    options = {"keep_ratio": 0.8, "rank_multiple": 8}
    plain, fine, coarse, nearest = (
        logits(compress(tiny_model(), **options, **more).model)
        for more in (
            {},
            {"quantize": "int8-g8"},
            {"quantize": "int4-g8"},
            {"quantize": "int4-g8", "quantize_options": {"rounding": "nearest"}},
        )
    )
    off = [float((found - plain).norm()) for found in (fine, coarse, nearest)]
    assert off[0] < 0.1 * off[1]
    assert off[1] < off[2]


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    from slimrank.pipeline.stages import quantization

    plan = mixed_plan(tiny_model())
    whole = compress(tiny_model(), plan=plan, out=tmp_path / "a").model
    rounded = quantization.Quantization._block

    def killed(self, index):
        if index == 2:
            raise KeyboardInterrupt
        rounded(self, index)

    monkeypatch.setattr(quantization.Quantization, "_block", killed)
    with pytest.raises(KeyboardInterrupt):
        compress(tiny_model(), plan=plan, out=tmp_path / "b")
    done = []
    monkeypatch.setattr(
        quantization.Quantization, "_block", lambda self, index: (done.append(index), rounded(self, index))
    )
    result = compress(tiny_model(), plan=plan, out=tmp_path / "b")
    assert done == [2]
    assert torch.equal(logits(result.model), logits(whole))
    stored = [load_file(tmp_path / name / "model.safetensors") for name in "ab"]
    assert all(torch.equal(tensor, stored[1][name]) for name, tensor in stored[0].items())


def test_the_report_tells_what_rounding_lost(tmp_path):
    report = compress(tiny_model(), keep_ratio=0.8, quantize="int4-g8", out=tmp_path / "o").report
    rows = report["targets"]
    assert all(0 < row["rounded"] < 1 for row in rows)
    assert all(row["form"].endswith(":int4-g8") for row in rows)
    assert "int4-g8" in (tmp_path / "o" / "report.md").read_text()


def refused(error, match, model=None, **options):
    with pytest.raises(error, match=match):
        compress(model or tiny_model(), **{"keep_ratio": 0.7, **options})


def test_bad_input_is_refused_before_any_work(tmp_path, monkeypatch):
    from slimrank.pipeline.stages.calibrate import Calibrate

    worked = Calibrate.run
    monkeypatch.setattr(Calibrate, "run", lambda *args: pytest.fail("the model was worked on"))
    refused(RecipeError, "weights have 2 to 8 bits, not 9", quantize="int9")
    refused(RecipeError, "'nf4' is not a scheme such as int8", quantize="nf4")
    refused(ModelError, "groups of 7 do not divide the 32 columns of a part of", quantize="int4-g7")
    refused(RecipeError, "has no option 'sweeps'|quantising", quantize="int8", quantize_options={"sweeps": 3})
    refused(RecipeError, "nothing is quantised", quantize_options={"anchor": 0.5})
    nearest = {"quantize_options": {"rounding": "nearest"}, "form": "pivot"}
    refused(RecipeError, "fewer than 8 bits destroys pivot layers", quantize="int6-g8", **nearest)
    shared = {"method": "basis_sharing", "method_options": {"layers": 2}}
    refused(RecipeError, "shares factors between layers, which are not quantised", quantize="int8", **shared)
    with pytest.raises(slimrank.SlimrankError, match="budget"):
        slimrank.compress(tiny_model(), byte_tokenizer(), max_bytes=9_000, quantize="int8", **SMALL)
    tied = tiny_model()
    tied.model.layers[1].mlp.down_proj.weight = tied.model.layers[0].mlp.down_proj.weight
    refused(ModelError, "tied layers are not quantised", tied, quantize="int8")
    monkeypatch.setattr(Calibrate, "run", worked)
    compress(tiny_model(), keep_ratio=0.7, quantize="int8", out=tmp_path / "q")
    with pytest.raises(slimrank.SlimrankError, match=r"compressed|quantised"):
        slimrank.compress(str(tmp_path / "q"), keep_ratio=0.7, **SMALL)
    known = importlib.util.find_spec
    monkeypatch.setattr(
        "slimrank.pipeline.stages.quantize.find_spec",
        lambda name: None if name == "compressed_tensors" else known(name),
    )
    refused(RecipeError, "compressed-tensors, which is not installed", quantize="int8")


def test_a_plan_with_unknown_forms_is_refused(tmp_path):
    content = mixed_plan(tiny_model()).model_dump()
    content["targets"][next(iter(content["targets"]))]["form"] = "pear:int4"
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(PlanError, match="is not a form that can be quantised"):
        RankPlan.load(tmp_path / "plan.json")


def test_plan_announces_the_stage(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    told = slimrank.preview(tmp_path, keep_ratio=0.8, quantize="int4-g8", **SMALL)
    assert told["seconds"]["quantize"] > 0


def test_slimrank_loads_it_again_and_refuses_to_compress_it_again(tmp_path):
    result = compress(tiny_model(), keep_ratio=0.8, quantize="int4-g8", rank_multiple=8, out=tmp_path / "o")
    loaded, _ = slimrank.load(tmp_path / "o")
    assert torch.equal(logits(loaded), logits(result.model))
    with pytest.raises(ModelError, match="already compressed"):
        slimrank.compress(tmp_path / "o", keep_ratio=0.5, **SMALL)
