"""Form, rank and bits of every layer chosen together within a byte budget; and the dense model of the same bytes."""

import json
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

import slimrank
from helpers import VOCABULARY, byte_tokenizer, text, tiny_model
from slimrank.budget.menu import MEASURED_BITS
from slimrank.budget.rank_plan import RankPlan
from slimrank.errors import BudgetError, RecipeError
from slimrank.layers.base import compressed_layers
from slimrank.layers.quantized import quantized_layers
from slimrank.pipeline.forecast import Shape
from slimrank.pipeline.prepare import Choices, Prepared
from slimrank.pipeline.stages.rounding import Rounding
from slimrank.recipe import Recipe

pytest.importorskip("compressed_tensors", reason="the extra 'quant' is not installed")

TEXT = torch.randint(VOCABULARY - 3, (2, 12), generator=torch.Generator().manual_seed(0))
SMALL = {"samples": 4, "seq_len": 16, "evaluation": None, "method": "svd_llm", "allocation": "spectrum"}
JOINT = {**SMALL, "bits": (2, 3, 4, 6, 8), "group_size": 8}
compress = partial(slimrank.compress, tokenizer=byte_tokenizer())


def logits(model):
    with torch.no_grad():
        return model(input_ids=TEXT).logits


def widths(plan):
    return [0 if t.form is None else int(t.form.partition(":int")[2][0]) for t in plan.targets.values()]


@pytest.mark.parametrize("method", ["svd_llm", "kfac_svd"])
@pytest.mark.parametrize("budget", [103_000, 125_000])
def test_the_result_fits_and_loads(budget, method, tmp_path):
    result = compress(tiny_model(), max_bytes=budget, out=tmp_path / "o", **{**JOINT, "method": method})
    assert sum(path.stat().st_size for path in (tmp_path / "o").glob("*.safetensors")) <= budget
    assert result.plan.bits <= result.plan.budget
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    assert torch.equal(logits(loaded), logits(result.model))
    found = {path: layer.scheme.bits for path, layer in quantized_layers(loaded).items()}
    for path, target in result.plan.targets.items():
        part = f"{path}.base" if target.base == "residual" else path
        assert found.get(part, 0) == (0 if target.form is None else int(target.form.partition(":int")[2][0]))
    assert {layer.kind for layer in compressed_layers(loaded).values()} <= {"residual"}


def low_rank_model():
    """A model whose weights have singular values that fall fast."""
    model = tiny_model()
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and "layers" in name:
            u, s, v = torch.linalg.svd(layer.weight.data, full_matrices=False)
            layer.weight.data = (u * (s * torch.exp(-torch.arange(len(s)) / 4.0))) @ v
    return model


@pytest.mark.parametrize("forms, bases", [("pair", {"pair"}), ("pivot", {"pivot"}), ("dense,pivot,pair", {"pivot"})])
def test_factors_of_few_bits_are_chosen_where_weights_have_a_low_rank(forms, bases, tmp_path):
    options = {**JOINT, "method": "kfac_svd", "max_bytes": 100_000}
    result = compress(low_rank_model(), forms=forms, out=tmp_path / "o", **options)
    assert {t.base for t in result.plan.targets.values()} >= bases
    assert {t.base for t in result.plan.targets.values()} <= {*forms.split(","), None}
    assert sum(path.stat().st_size for path in (tmp_path / "o").glob("*.safetensors")) <= 100_000
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "o")), logits(result.model))
    if "dense" in forms:
        dense = compress(low_rank_model(), forms="dense", **options)
        more = (dense.plan.budget - result.plan.budget) // 8  # headers of fewer tensors are smaller
        dense = compress(low_rank_model(), forms="dense", **options | {"max_bytes": 100_000 - more})
        assert result.report["allocation"]["predicted"] < 0.9 * dense.report["allocation"]["predicted"]
        assert loss_to(result.model) < loss_to(dense.model)


def loss_to(model):
    """Mean divergence of a compressed low-rank model from the original."""
    original, found = (logits(m).double().log_softmax(-1) for m in (low_rank_model(), model))
    return float((original.exp() * (original - found)).sum(-1).mean())


def test_more_bytes_mean_more_bits():
    found = [sum(widths(compress(tiny_model(), max_bytes=b, **JOINT).plan)) for b in (103_000, 110_000, 120_000)]
    assert found == sorted(found)
    assert found[0] < found[-1]


def test_a_layer_that_rounds_without_loss_gets_the_fewest_bits():
    model = tiny_model()
    path = "model.layers.1.mlp.up_proj"
    weight = model.get_submodule(path).weight.data
    weight.copy_(0.125 * (weight > 0))
    plan = compress(model, max_bytes=84_000, forms="dense", **JOINT).plan
    found = dict(zip(plan.targets, widths(plan), strict=True))
    assert found.pop(path) == 2
    assert min(found.values()) > 2
    assert {t.base for t in plan.targets.values()} == {"dense"}


def test_what_rounding_loses_follows_from_four_bits(tmp_path):
    """Rounded for real, layers lose what a trial in 4 bits says of other widths, within a factor of 2."""
    from slimrank.layers.dense import weight_of
    from slimrank.linalg.gptq import error, gptq
    from slimrank.linalg.scheme import Scheme

    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=draw, dtype=torch.float64)
    x = torch.randn(500, 64, generator=draw, dtype=torch.float64) @ torch.randn(64, 64, generator=draw).double()
    lost = {
        bits: float(error(weight, gptq(weight, x.t() @ x, Scheme(bits, 16), torch.float32).values(), x.t() @ x).sum())
        for bits in (3, 4, 5, 6, 8)
    }
    for bits, found in lost.items():
        assert 0.5 < found / (lost[MEASURED_BITS] * 4.0 ** (MEASURED_BITS - bits)) < 2
    assert weight_of(tiny_model().model.layers[0].mlp.up_proj).shape == (48, 32)


@pytest.mark.parametrize("m, n", [(6, 9), (9, 6), (7, 7)])
@pytest.mark.parametrize("form", ["none", "diagonal", "whole", "seen"])
def test_the_energy_of_an_error_is_that_of_the_metric(form, m, n):
    from observed import random
    from slimrank.linalg.forms import Form
    from slimrank.pipeline.stages.rounding import relative_energy

    weight, lost, root, x = random(m, n, seed=1), random(m, n, seed=2), random(m, m, seed=3), random(n, 40, seed=4)
    gram, g = (
        x @ x.t(),
        {"none": torch.eye(m).double(), "diagonal": root.square().sum(1).diag()}.get(form, root @ root.t()),
    )
    rows = {
        "none": Form(),
        "diagonal": Form(g.diagonal()),
        "whole": Form(g),
        "seen": Form(weight.t() @ g @ weight, True),
    }
    if form == "seen":  # an error in the span of W's columns is seen whole
        lost = weight @ random(n, n, seed=5)
    expected = float(((g @ lost @ gram) * lost).sum() / ((g @ weight @ gram) * weight).sum())
    scale = m / n if form == "seen" and m > n else 1.0
    if form != "seen" or m >= n:
        assert relative_energy(lost, weight, gram, rows[form]) == pytest.approx(expected * scale, rel=1e-8)


def test_the_plan_is_found_alone_and_followed(tmp_path):
    options = {"max_bytes": 110_000, **JOINT}
    plan, about = slimrank.find_plan(tiny_model(), byte_tokenizer(), **options)
    whole = compress(tiny_model(), **options)
    assert plan.targets == whole.plan.targets
    assert about["predicted"] == pytest.approx(whole.report["allocation"]["predicted"])
    plan.save(tmp_path / "plan.json")
    again = compress(tiny_model(), plan=RankPlan.load(tmp_path / "plan.json"), **SMALL | {"allocation": "uniform"})
    assert torch.equal(logits(again.model), logits(whole.model))


def test_a_run_directory_serves_another_budget(tmp_path, monkeypatch):
    from slimrank.pipeline.stages import rounding

    first = compress(tiny_model(), max_bytes=110_000, run_dir=tmp_path / "run", **JOINT)
    monkeypatch.setattr(rounding._Trial, "block", None)
    again = compress(tiny_model(), max_bytes=110_000, run_dir=tmp_path / "run", **JOINT)
    other = compress(tiny_model(), max_bytes=120_000, run_dir=tmp_path / "run", **JOINT)
    assert torch.equal(logits(again.model), logits(first.model))
    assert sum(widths(other.plan)) > sum(widths(first.plan))


def test_patterns_keep_layers_as_they_are():
    plan = compress(tiny_model(), max_bytes=140_000, ranks={"down_proj": "dense"}, **JOINT).plan
    for path, target in plan.targets.items():
        assert (target.form is None) == path.endswith("down_proj") or not path.endswith("down_proj")


def test_measured_divergence_chooses_bits_too():
    options = {**JOINT, "allocation": "lems", "search_samples": 2}
    plan = compress(tiny_model(), max_bytes=110_000, **options).plan
    assert plan.bits <= plan.budget
    assert plan.allocation == "lems"


def test_bad_input_is_refused():
    with pytest.raises(BudgetError, match="smallest forms that the widths allow take"):
        compress(tiny_model(), max_bytes=100_000, **{**JOINT, "bits": (8,)})
    with pytest.raises(RecipeError, match="chooses ranks only, no bits"):
        compress(tiny_model(), max_bytes=110_000, **{**JOINT, "allocation": "uniform"})
    with pytest.raises(RecipeError, match="groups of 7 do not divide the 32 columns"):
        compress(tiny_model(), max_bytes=110_000, **{**JOINT, "group_size": 7})
    with pytest.raises(RecipeError, match="forms are chosen together with bits"):
        compress(tiny_model(), keep_ratio=0.8, forms="pair")
    with pytest.raises(RecipeError, match="'pear' is not a form that can be quantised; known: dense, pair"):
        compress(tiny_model(), max_bytes=110_000, **JOINT, forms="pear")
    with pytest.raises(RecipeError, match="there is none"):
        compress(tiny_model(), max_bytes=110_000, **JOINT, baselines="4")


def test_what_one_form_for_all_layers_would_take_and_lose_is_told():
    result = compress(tiny_model(), max_bytes=110_000, **JOINT)
    found = {(each["form"], each["rank"]): each for each in result.report["allocation"]["alternatives"]}
    size, predicted = result.report["size"]["linears_bytes"], result.report["allocation"]["predicted"]
    assert ("dense:int4-g8", "dense") in found
    assert ("residual:int3-g8/int8", 8) in found
    for each in found.values():  # the plan is the best of its size
        assert each["size"] > size or each["error"] >= predicted * (1 - 1e-9)
    (section,) = [s for s in result.report["sections"] if s["stage"] == "allocate"]
    assert len(section["rows"]) == len(found)
    assert f"The plan takes {size:,} bytes" in section["note"]


def test_plan_previews_it(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    told = slimrank.preview(tmp_path, max_bytes=110_000, **JOINT)
    assert {"measure rounding", "quantize"} <= told["seconds"].keys()
    assert told["plan"].bits <= told["plan"].budget
    assert {t.base for t in told["plan"].targets.values()} <= {"dense", "residual"}
    stage, costs = Rounding(), []
    for forms in ("dense", "dense,pair", "dense,pair,pivot"):  # trials of factors take time
        prepared = Prepared.of(Choices.of(Recipe.make({**JOINT, "max_bytes": 110_000, "forms": forms})), tiny_model())
        costs.append(stage.cost(prepared, Shape.of(prepared, {"calibration": 64})).float64)
    assert costs == sorted(set(costs))


def test_from_the_command_line(tmp_path):
    from typer.testing import CliRunner

    from slimrank.cli.app import app

    def run(*arguments):
        found = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
        assert found.exit_code == 0, found.output
        return " ".join(found.output.split())

    model, plan = tmp_path / "m", tmp_path / "plan.json"
    tiny_model().save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    text = ["--samples", 4, "--seq-len", 16]
    budget = ["--max-bytes", 110_000, "--preset", "small", "--group-size", 8, *text]
    guessed = run("plan", model, *budget)
    assert "these forms are a guess" in guessed
    assert "size of the linears" in guessed
    assert "bits for each weight of the linears" in guessed
    assert "predicted loss" not in guessed
    told = run("plan", model, *budget, "--save", plan)
    assert "stored as" in told
    assert "predicted loss, over the plan's" in told
    assert "fewer bits lose less than such low ranks" in run("plan", model, "--max-bytes", 120_000, *text)
    assert ":int" in told
    run("compress", model, "--preset", "small", "--plan", plan, *text, "--no-eval", "--out", tmp_path / "o")
    assert RankPlan.load(tmp_path / "o" / "plan.json").targets == RankPlan.load(plan).targets
    widths = ["--bits", "3,4", "--bits", 8, "--method", "svd_llm", "--allocation", "spectrum", "--group-size", 8]
    run("compress", model, "--max-bytes", 110_000, *widths, *text, "--no-eval", "--out", tmp_path / "p")
    forms = {target.form for target in RankPlan.load(tmp_path / "p" / "plan.json").targets.values()}
    assert {form.partition(":int")[2][0] for form in forms if form} <= {"3", "4", "8"}


def test_the_dense_model_of_no_more_bytes_is_measured_beside(tmp_path):
    page = tmp_path / "text.txt"
    page.write_text(text(400))
    options = {**JOINT, "evaluation": str(page), "windows": 2, "baselines": "8,4,2"}
    plain = compress(tiny_model(), max_bytes=110_000, **{**options, "baselines": ()})
    result = compress(tiny_model(), max_bytes=110_000, out=tmp_path / "o", **options)
    assert torch.equal(logits(result.model), logits(plain.model))  # the weights were put back
    (section,) = [s for s in result.report["sections"] if s["stage"] == "baselines"]
    (row,) = section["rows"]
    assert row[0] in ("int4-g8", "int2-g8")
    alone = compress(
        tiny_model(),
        keep_ratio=1.0,
        quantize=row[0],
        **SMALL | {"evaluation": str(page), "windows": 2, "allocation": "uniform"},
    )
    assert float(row[2]) == pytest.approx(alone.report["after"]["perplexity"]["perplexity"], abs=2e-3)
    assert "The original in few bits" in (tmp_path / "o" / "report.md").read_text()
    small = compress(tiny_model(), max_bytes=103_000, **{**options, "baselines": "8"})
    (section,) = [s for s in small.report["sections"] if s["stage"] == "baselines"]
    assert not section["rows"]
    assert "No width among the baselines is as small" in section["note"]


def test_the_preset_needs_a_budget_in_bytes_only(tmp_path):
    options = {**slimrank.Recipe.preset("small"), **{k: SMALL[k] for k in ("samples", "seq_len", "evaluation")}}
    result = compress(tiny_model(), max_bytes=100_000, **{**options, "group_size": 16})
    assert result.plan.quantized()
    assert json.dumps(result.report["allocation"])
