"""Pivot layers through `slimrank.compress`: the same function as pairs of the same ranks, in exactly the size told."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import slimrank
from helpers import save_tiny, tiny_model
from method_runs import (
    KEEP,
    SAMPLES,
    SEQ_LEN,
    TEXT,
    _quick,  # noqa: F401
    assert_same,
    compress,
    interrupted_then_resumed,
    logits,
    run,
    tied_between_layers,
)
from slimrank.budget.rank_plan import RankPlan
from slimrank.errors import BudgetError, PlanError, RecipeError
from slimrank.layers import LowRankLinear, PivotLinear
from slimrank.layers.base import compressed_layers
from slimrank.layers.forms import PAIR, PIVOT
from slimrank.methods.decomposer import DECOMPOSERS
from slimrank.methods.refiner import REFINERS
from slimrank.recipe import Recipe
from test_allocation_end_to_end import IDS as ALLOCATIONS
from test_allocation_end_to_end import allocated

FORMS = {"primary": {"form": "pivot"}, "secondary": {"store_form": "pivot"}}
METHODS = [id for id, method in DECOMPOSERS.all().items() if method.groups is None]
BUDGETS = [{"keep_ratio": 0.58}, {"keep_total": 0.8}, {"max_bytes": 100_000}]


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


def stored_tensors(folder):
    found = {}
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return found


def written_bytes(folder):
    return sum(p.stat().st_size for p in Path(folder).glob("*.safetensors"))


def compress_to(folder, model="llama", **options):
    save_tiny(folder / "model", model)
    chosen = {
        "method": "svd_llm",
        "calibration": TEXT,
        "evaluation": None,
        "samples": SAMPLES,
        "seq_len": SEQ_LEN,
        "batch_size": 2,
    }
    return slimrank.compress(folder / "model", out=folder / "out", **{**chosen, **options})


# every method --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_equals_pairs_of_the_same_ranks(method, model, form):
    """In float64, so that nothing but rounding lies between them."""
    pivot = compress(tiny_model(model).double(), method=method, **form)
    plan = pivot.plan.model_copy(update={"cost_model": "pair", "secondary": None, "budget": None})
    pair = compress(tiny_model(model).double(), method=method, keep_ratio=None, plan=plan)
    torch.testing.assert_close(logits(pivot.model), logits(pair.model), rtol=1e-9, atol=1e-9)
    for path, layer in compressed_layers(pivot.model).items():
        assert isinstance(layer, PivotLinear)
        assert isinstance(pair.model.get_submodule(path), LowRankLinear)
        assert layer.rank == pivot.plan.targets[path].rank
        assert (layer.bias is None) == (pair.model.get_submodule(path).bias is None)
    assert compressed_layers(pivot.model).keys() == pivot.plan.factored().keys()


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_the_report_says_what_is_stored(method, model, form):
    result = compress(model, method=method, **form)
    size, layers = result.report["size"], compressed_layers(result.model)
    stored = sum(layer.skeleton.weight.numel() + layer.interpolation.weight.numel() for layer in layers.values())
    assert stored == result.plan.stored_parameters == size["linears_after"]
    assert stored == sum(row["parameters_after"] for row in result.report["targets"])
    assert size["parameters_after"] == sum(p.numel() for p in result.model.parameters())
    assert size["keep_ratio"] == result.plan.keep_ratio <= KEEP
    assert size["stored_as"] == "pivot"
    assert result.plan.parameters <= result.plan.budget
    assert bool(torch.isfinite(logits(result.model)).all())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_factors_are_cast_once(dtype, form):
    """16 bits lose what they lose for pairs, and little more."""
    kind = getattr(torch, dtype)
    exact = compress(tiny_model().to(kind).double(), method="svd", **form)
    ours = compress(tiny_model().to(kind), method="svd", **form)
    assert ours.plan.targets == exact.plan.targets
    for path, layer in compressed_layers(ours.model).items():
        assert {p.dtype for p in layer.parameters()} == {kind}
        other = exact.model.get_submodule(path)
        assert torch.equal(layer.order, other.order)
        eps = max(torch.finfo(kind).eps, 1e-6)
        for mine, theirs in ((layer.skeleton, other.skeleton), (layer.interpolation, other.interpolation)):
            torch.testing.assert_close(mine.weight.double(), theirs.weight, rtol=eps, atol=20 * eps)


# ranks and budgets ---------------------------------------------------------------------------------------------


def test_the_same_size_holds_higher_ranks_and_less_error():
    pair, pivot = compress(method="svd"), compress(method="svd", form="pivot")
    for path, layer in pivot.plan.targets.items():
        m, n = layer.shape
        assert layer.rank > pair.plan.targets[path].rank
        assert PIVOT.parameters(m, n, layer.rank) <= KEEP * m * n < PIVOT.parameters(m, n, layer.rank + 1)
    for small, large in zip(pivot.report["targets"], pair.report["targets"], strict=True):
        assert small["relative_error"] < large["relative_error"]


def test_the_same_ranks_take_less():
    pair, pivot = compress(method="svd"), compress(method="svd", store_form="pivot")
    assert pair.plan.targets == pivot.plan.targets
    assert pair.plan.parameters == pivot.plan.parameters == pair.plan.stored_parameters
    saved = sum(t.rank**2 for t in pivot.plan.targets.values())
    assert pivot.plan.stored_parameters == pair.plan.parameters - saved
    torch.testing.assert_close(logits(pivot.model), logits(pair.model), rtol=1e-4, atol=1e-4)


def test_every_rank_below_the_full_one_is_worth_storing():
    """Pairs are dense from a third of the full rank on; here 1 off the full rank is still smaller than dense."""
    result = compress(method="svd", keep_ratio=0.97, form="pivot")
    ranks = {path: t for path, t in result.plan.targets.items() if t.rank != "dense"}
    assert any(t.rank > PAIR.largest_rank(*t.shape) for t in ranks.values())
    assert result.plan.keep_ratio <= 0.97


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_every_allocation(allocation):
    result = allocated(allocation, form="pivot")
    assert result.plan.cost_model == "pivot"
    assert result.plan.parameters <= result.plan.budget
    assert result.report["size"]["keep_ratio"] > 0.5
    assert result.report["size"]["parameters_after"] == sum(p.numel() for p in result.model.parameters())


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: next(iter(b)))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_budgets_are_kept_on_disk(budget, dtype, form, tmp_path):
    budget = {k: v if isinstance(v, float) or dtype == "float32" else v // 2 for k, v in budget.items()}
    result = compress_to(tmp_path, dtype=dtype, **budget, **form)
    size, written = result.report["size"], written_bytes(tmp_path / "out")
    name, limit = next(iter(budget.items()))
    reached = {"max_bytes": written, **size}[name]
    assert reached <= limit
    assert reached > (0.85 if "form" in form else 0.75) * limit  # of a tiny file, much is header
    assert size["bytes_after"] == written
    foretold = slimrank.preview(tmp_path / "model", method="svd_llm", dtype=dtype, **budget, **form)
    assert 0 <= written - foretold["size"]["bytes_after"] < 16384  # the header of a safetensors file
    assert foretold["plan"] == result.plan
    for key in ("keep_ratio", "keep_total", "parameters_after", "stored_as"):
        assert foretold["size"][key] == size[key]


def test_the_file_holds_the_parameters_counted_and_the_orders(form, tmp_path):
    result = compress_to(tmp_path, keep_ratio=KEEP, **form)
    stored = stored_tensors(tmp_path / "out")
    orders = {k: t for k, t in stored.items() if k.endswith(".order")}
    assert len(orders) == len(result.plan.factored())
    assert {t.dtype for t in orders.values()} == {torch.int32}
    assert sum(t.numel() for t in orders.values()) == sum(min(t.shape) for t in result.plan.targets.values())
    kept = sum(t.numel() for k, t in stored.items() if k not in orders)
    assert kept == result.report["size"]["parameters_after"]
    foretold = slimrank.preview(tmp_path / "model", method="svd_llm", keep_ratio=KEEP, **form)
    sizes = foretold["size"], compress(**form).report["size"]
    assert {s["bytes_after"] for s in sizes} == {sum(t.nbytes for t in stored.values())}


def test_a_dense_rank_stays_dense(form):
    result = compress(ranks={"*.v_proj": "dense"}, **form)
    dense = tiny_model()
    for path, target in result.plan.targets.items():
        layer = result.model.get_submodule(path)
        assert isinstance(layer, torch.nn.Linear if path.endswith("v_proj") else PivotLinear)
        assert (target.rank == "dense") == path.endswith("v_proj")
        if target.rank == "dense":
            assert torch.equal(layer.weight, dense.get_submodule(path).weight)
    assert result.report["size"]["parameters_after"] == sum(p.numel() for p in result.model.parameters())


def test_bounds_of_ranks_reach_beyond_those_of_pairs():
    result = compress(keep_ratio=0.9, form="pivot", ranks={"*.0.self_attn.q_proj": 30})
    assert result.plan.targets["model.layers.0.self_attn.q_proj"].rank == 30 > PAIR.largest_rank(32, 32)
    with pytest.raises(PlanError, match="no multiple of"):
        compress(keep_ratio=0.9, ranks={"*.0.self_attn.q_proj": 30})
    with pytest.raises(BudgetError):
        compress(keep_ratio=0.3, form="pivot", ranks={"*": "30.."})


def test_weights_too_small_for_pairs():
    """2 x 2 holds rank 1 in 3 numbers."""
    assert (PAIR.largest_rank(2, 2), PIVOT.largest_rank(2, 2), PIVOT.largest_rank(1, 9)) == (0, 1, 0)
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(9, 1)})])
    model.layers[0]["c"] = torch.nn.Linear(8, 8)
    assert [t.path for t in slimrank.find_targets(model)] == ["layers.0.c"]
    assert [t.path for t in slimrank.find_targets(model, form=PIVOT)] == ["layers.0.a", "layers.0.c"]


def test_the_full_rank_by_hand(tmp_path):
    """No budget asks for it, a plan may: then there is nothing to interpolate, and the layer is the weight."""
    plan = compress(tiny_model().double(), form="pivot").plan
    whole = {path: t.model_copy(update={"rank": min(t.shape)}) for path, t in plan.targets.items()}
    plan = plan.model_copy(update={"targets": whole, "budget": None})
    result = compress(tiny_model().double(), keep_ratio=None, plan=plan)
    torch.testing.assert_close(logits(result.model), logits(tiny_model().double()), rtol=1e-3, atol=1e-6)
    assert result.report["size"]["keep_ratio"] == 1.0
    result.model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(result.model))


# plans ---------------------------------------------------------------------------------------------------------


def test_plans_carry_the_form(form, tmp_path):
    first = compress(**form)
    first.plan.save(tmp_path / "plan.json")
    assert RankPlan.load(tmp_path / "plan.json") == first.plan
    again = compress(keep_ratio=None, plan=str(tmp_path / "plan.json"))
    assert again.plan == first.plan
    assert_same(again, first)


def test_a_plan_for_pairs_may_be_stored_as_pivot_layers():
    pair = compress()
    stored = compress(keep_ratio=None, plan=pair.plan, store_form="pivot")
    assert stored.plan == pair.plan.model_copy(update={"secondary": "pivot"})
    assert_same(stored, compress(store_form="pivot"))


def test_forms_that_contradict_a_plan_are_refused(tmp_path):
    pair, pivot = compress().plan, compress(form="pivot").plan
    with pytest.raises(RecipeError, match="chosen for pairs"):
        compress(keep_ratio=None, plan=pair, form="pivot")
    with pytest.raises(RecipeError, match="chosen for pivot layers already"):
        compress(keep_ratio=None, plan=pivot, store_form="pivot")
    save_tiny(tmp_path / "model")
    with pytest.raises(RecipeError, match="chosen for pairs"):
        slimrank.preview(tmp_path / "model", plan=pair, form="pivot")


@pytest.mark.parametrize("form, other", [("pair", "pivot"), ("pivot", "pair")])
def test_ranks_of_a_file_that_were_chosen_for_the_other_form_are_refused(form, other, tmp_path):
    """Also where each would fit: as pairs they store more than they were chosen for."""
    file = tmp_path / "plan.json"
    plan = compress(form=form, keep_ratio=0.4).plan
    plan.model_copy(update={"budget": None}).save(file)
    options = {"allocation": "from_plan", "allocation_options": {"file": str(file)}, "keep_ratio": 0.9}
    with pytest.raises(PlanError, match=f"chosen for form {form}, not {other}") as raised:
        compress(form=other, **options)
    assert raised.value.hint == f"--form {form}; or --plan {file}, which follows the form"
    assert compress(form=form, **options).plan.targets == plan.targets


@pytest.mark.parametrize("change", [{"cost_model": "other"}, {"cost_model": "pivot", "store_form": "pivot"}])
def test_plan_files_that_make_no_sense(change, tmp_path):
    content = {**compress().plan.model_dump(), **change}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(PlanError, match="is not a rank plan"):
        RankPlan.load(tmp_path / "plan.json")


def test_a_budget_in_a_plan_is_one_of_its_cost_model():
    """Ranks chosen for pivot layers would be over the budget as pairs."""
    plan = compress(form="pivot").plan
    pairs = sum(PAIR.parameters(*t.shape, t.rank) for t in plan.targets.values())
    assert plan.parameters <= plan.budget < pairs
    with pytest.raises(PlanError, match="over its budget"):
        compress(keep_ratio=None, plan=plan.model_copy(update={"cost_model": "pair"}))


# what does not go together -------------------------------------------------------------------------------------


def test_shared_factors_are_refused(form, tmp_path):
    with pytest.raises(RecipeError, match="shares factors between layers"):
        compress(method="basis_sharing", **form)
    save_tiny(tmp_path / "model")
    with pytest.raises(RecipeError, match="shares factors between layers"):
        slimrank.preview(tmp_path / "model", keep_ratio=KEEP, method="basis_sharing", **form)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"form": "pivot", "store_form": "pivot"}, "layers are stored as pivot already"),
        ({"form": "pifa"}, "form"),
        ({"store_form": "pairs"}, "pairs"),
    ],
)
def test_recipes_that_make_no_sense(options, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.make({"keep_ratio": KEEP, **options})


# refining, ties, resuming --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("refiner", REFINERS.all())
def test_refined_products_are_those_of_pairs(refiner, bias):
    options = {"refine": refiner, "refine_options": {"bias": bias, "ridge": 1e-3}}
    pair, pivot = (compress(tiny_model("qwen2").double(), **options, store_form=s) for s in (None, "pivot"))
    assert {type(layer) for layer in compressed_layers(pivot.model).values()} == {PivotLinear}
    torch.testing.assert_close(logits(pivot.model), logits(pair.model), rtol=1e-5, atol=1e-5)
    for row, other in zip(pivot.report["targets"], pair.report["targets"], strict=True):
        assert row["refined"] == pytest.approx(other["refined"], rel=1e-4)
    assert pivot.report["size"]["parameters_after"] == sum(p.numel() for p in pivot.model.parameters())


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("bias", ["none", "all"])
def test_resuming_a_refinement_gives_the_same_bits(after, bias, form, tmp_path):
    options = {"refine": "regress", "refine_options": {"bias": bias}, **form}
    resumed, notes = interrupted_then_resumed(tmp_path, "cut and refine factors", after, **options)
    assert_same(resumed, compress(**options))
    assert notes[-1] == f"resuming at block {after} of 3"


def test_pairs_and_pivot_layers_do_not_resume_each_other(tmp_path):
    options = {"refine": "update", "run_dir": tmp_path}
    compress(**options)
    pivot = compress(store_form="pivot", **options)
    assert_same(pivot, compress(store_form="pivot", refine="update"))


@pytest.mark.parametrize("refine", [None, "regress"])
def test_weights_tied_between_layers_stay_tied(refine, form, tmp_path):
    result = compress(tied_between_layers(), refine=refine, **form)
    result.model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for model in (result.model, loaded):
        first, second = (model.model.layers[i].mlp.up_proj for i in (0, 1))
        assert first.skeleton.weight is second.skeleton.weight
        assert first.interpolation.weight is second.interpolation.weight
        assert torch.equal(first.order, second.order)
        assert first.order.data_ptr() != second.order.data_ptr()
    assert torch.equal(logits(loaded), logits(result.model))
    assert sum(p.numel() for p in loaded.parameters()) == result.report["size"]["parameters_after"]
    stored = stored_tensors(tmp_path)
    assert sum(t.numel() for t in stored.values() if t.is_floating_point()) == result.report["size"]["parameters_after"]


def test_spectra_of_a_run_serve_both_forms(tmp_path):
    compress(method="svd_llm", run_dir=tmp_path)
    again = compress(method="svd_llm", run_dir=tmp_path, form="pivot")
    assert_same(again, compress(method="svd_llm", form="pivot"))


# command line --------------------------------------------------------------------------------------------------


def test_flags(capsys, tmp_path):
    save_tiny(tmp_path / "model")
    shared = [tmp_path / "model", "--keep", KEEP, "--method", "svd", "--no-eval"]
    shown = json.loads(run(capsys, "plan", *shared, "--form", "pivot", "--json")[1])
    assert shown["size"]["stored_as"] == shown["plan"]["cost_model"] == "pivot"
    code, out, error = run(
        capsys, "compress", *shared, "--store-form", "pivot", "--seq-len", 16, "--out", tmp_path / "out", "--json"
    )
    assert code == 0, error
    size = json.loads(out)["size"]
    assert size["stored_as"] == "pivot"
    assert size["bytes_after"] == written_bytes(tmp_path / "out")
    assert "stored as pivot layers" in (tmp_path / "out" / "report.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {type(layer) for layer in compressed_layers(model).values()} == {PivotLinear}
    assert model.generate(torch.arange(5)[None], max_new_tokens=3, do_sample=False).shape == (1, 8)
    code, _, error = run(capsys, "plan", *shared, "--form", "pivto")
    assert code != 0
    assert "known: pair, pivot" in error
