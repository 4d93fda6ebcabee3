"""Allocations on tiny models: measurements against brute force, plans through `compress`, resuming, bad input."""

import copy
import json
import re

import pytest
import torch

from helpers import byte_tokenizer, save_tiny, tiny_model
from method_runs import SAMPLES, SEQ_LEN, TEXT, compress, run
from problems import problem
from slimrank.budget.additivity import additivity
from slimrank.budget.problem import Allocation
from slimrank.budget.rank_plan import RankPlan
from slimrank.errors import BudgetError, NonFiniteError, PlanError, RecipeError
from slimrank.layers.dense import weight_of
from slimrank.methods.allocator import ALLOCATORS, allocator
from slimrank.models.targets import find_targets
from slimrank.text.tokens import tokenise
from slimrank.text.windows import draw_apart, draw_windows

SEARCH = 3
QUICK = {"fermigrad": {"steps": 2}, "dobi": {"steps": 1}, "atp": {"trials": 2}, "asvd": {"fractions": [0.5, 0.9]}}
IDS = [id for id in ALLOCATORS.all() if id != "from_plan"]


def allocated(id, model="llama", **changes):
    options = {"allocation": id, "allocation_options": QUICK.get(id, {}), "search_samples": SEARCH}
    return compress(model, **{**options, **changes})


def search_windows():
    tokens = tokenise("\n\n".join(TEXT), byte_tokenizer())
    (windows,), apart = draw_apart(tokens, [SEARCH], SAMPLES, SEQ_LEN, 0)
    assert apart
    return windows


@pytest.fixture
def looking():
    """An allocator that shows what it is given to a function, and keeps everything dense or uniform."""
    seen = {}

    def register(look, needs=("spectra", "divergence")):
        def inspect(problem):
            seen["result"] = look(problem)
            return Allocation(ALLOCATORS.get("uniform").configured({}).allocate(problem).ranks)

        allocator("looking", "for tests", "tests", needs=needs)(inspect)
        return seen

    yield register
    ALLOCATORS.entries.pop("looking", None)


def scores(model, other, temperature=0.6, dropped=SEQ_LEN // 2):
    """KL and NLL over the positions that count, written down plainly in float64."""
    with torch.no_grad():
        teacher, student = (m(input_ids=search_windows()).logits[:, dropped:].double() for m in (model, other))
    p, q = ((z / temperature).log_softmax(dim=-1) for z in (teacher, student))
    kl = (p.exp() * (p - q)).sum(dim=-1).mean()
    labels = search_windows()[:, dropped + 1 :]
    nll = -student[:, :-1].log_softmax(dim=-1).gather(-1, labels[..., None]).mean()
    return float(kl), float(nll)


def cut(model, ranks, problem):
    """A copy of a model with dense products of factors in the place of weights."""
    changed = copy.deepcopy(model)
    for path, rank in ranks.items():
        if rank != "dense":
            a, b = problem.probe.spectra.factors(problem.probe.units[path], rank)
            weight_of(changed.get_submodule(path)).data.copy_(b[0] @ a)
    return changed


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_effects_are_those_of_the_whole_model(name, looking):
    """Suffixes from cached block inputs, and the head in chunks, against whole forward passes."""

    def look(problem):
        ranks = {item.path: [2, 5] for item in problem.items}
        plan = {item.path: "dense" if i % 3 == 0 else 1 + i % 4 for i, item in enumerate(problem.items)}
        brute = {path: [scores(dense, cut(dense, {path: r}, problem)) for r in some] for path, some in ranks.items()}
        return problem.probe.single(ranks), brute, problem.probe.joint(plan), scores(dense, cut(dense, plan, problem))

    dense = tiny_model(name)
    seen = looking(look)
    allocated("looking", name, allocation_options={})
    single, brute, joint, expected = seen["result"]
    for path, effects in single.items():
        for effect, wanted in zip(effects, brute[path], strict=True):
            assert effect == pytest.approx(wanted, rel=2e-3, abs=1e-6)
        assert effects[0].kl > 0
    assert joint == pytest.approx(expected, rel=2e-3)


def test_measuring_options_count(looking):
    def look(problem):
        ranks = {item.path: "dense" if i else 2 for i, item in enumerate(problem.items)}
        return problem.probe.joint(ranks), scores(dense, cut(dense, ranks, problem), 1.0, 3)

    dense = tiny_model()
    seen = looking(look)
    allocated("looking", allocation_options={"temperature": 1.0, "dropped": 3})
    assert seen["result"][0] == pytest.approx(seen["result"][1], rel=2e-3)


def test_influence_is_the_cosine_of_inputs_and_outputs(looking):
    seen = looking(lambda problem: problem.probe.influence(), ["influence"])
    dense = tiny_model()
    allocated("looking", allocation_options={})
    with torch.no_grad():
        states = dense(input_ids=search_windows(), output_hidden_states=True).hidden_states
    for index, found in enumerate(seen["result"][:-1]):  # the last state is normed
        cosine = torch.nn.functional.cosine_similarity(states[index], states[index + 1], dim=-1).mean()
        assert found == pytest.approx(float(cosine), rel=1e-5)


def test_soft_ranks_at_their_ends_and_their_gradient(looking):
    """Nothing missing is the original; all beyond the rank missing is the cut model."""

    def look(problem):
        from slimrank.methods.allocate.fermigrad import Masks
        from slimrank.methods.soft_ranks import full_ranks

        masks, top = Masks(problem), full_ranks(problem)
        cold = torch.full_like(top, 1e-3)
        ranks = {item.path: 4 for item in problem.items}
        at = lambda r: float(masks.loss(torch.full_like(top, float(r)), torch.full_like(top, 0.7), 0))  # noqa: E731
        mu = torch.full_like(top, 6.0).requires_grad_()
        with torch.enable_grad():
            masks.loss(mu, torch.full_like(top, 0.7), 0).backward()
        whole = problem.probe.loss({}, 0)
        return (
            float(masks.loss(top + 1, cold, 0)), float(whole),
            float(masks.loss(torch.full_like(top, 4.0), cold, 0)), loss_of(cut(dense, ranks, problem)),
            float(mu.grad.sum()), (at(6.01) - at(5.99)) / 0.02,
        )  # fmt: skip

    def loss_of(model):
        ids = search_windows()[:2]  # the first batch
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, :-1]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))

    dense = tiny_model()
    seen = looking(look, ["spectra", "gradient"])
    allocated("looking", allocation_options={})
    full, whole, masked, expected, slope, difference = seen["result"]
    assert full == pytest.approx(whole, rel=1e-6)
    assert whole == pytest.approx(loss_of(dense), rel=1e-5)
    assert masked == pytest.approx(expected, rel=1e-4)
    assert slope == pytest.approx(difference, rel=0.05, abs=2e-4)


# through compress ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["svd_llm", "kfac_svd", "svd", "basis_sharing"])
@pytest.mark.parametrize("id", IDS)
def test_every_allocation_goes_with_methods_of_every_kind(id, method):
    result = allocated(id, method=method)
    assert result.plan.allocation == id
    assert result.plan.parameters <= result.plan.budget
    assert result.report["size"]["keep_ratio"] <= 0.6
    with torch.no_grad():
        assert bool(torch.isfinite(result.model(input_ids=search_windows()).logits).all())


@pytest.mark.parametrize("id", ["spectrum", "lems", "fermigrad", "shared"])
@pytest.mark.parametrize("model", ["gpt2", "qwen2"])
def test_biases_ties_and_other_layouts(id, model):
    result = allocated(id, model, rank_multiple=2)
    assert all(t.rank == "dense" or t.rank % 2 == 0 for t in result.plan.targets.values())


@pytest.mark.parametrize("method, in_loss", [("kfac_svd", True), ("svd_llm", False), ("svd", False)])
def test_allocators_know_whether_spectra_are_in_units_of_the_loss(method, in_loss, looking):
    seen = looking(lambda problem: problem.in_loss, ["spectra"])
    allocated("looking", method=method, allocation_options={})
    assert seen["result"] == in_loss


def test_methods_that_need_ranks_beforehand_get_uniform_ones():
    result = allocated("lems", method="dobi_svd")
    assert result.plan.parameters <= result.plan.budget


def test_refining_follows_the_allocation():
    result = allocated("spectrum", refine="update")
    assert all("refined" in row or row["rank"] == "dense" for row in result.report["targets"])


@pytest.mark.parametrize("id", ["lems", "spectrum", "ada_cr"])
def test_a_plan_is_the_same_from_the_run_directory(id, tmp_path, monkeypatch):
    """Measured and decomposed once, for any budget."""
    first = allocated(id, run_dir=tmp_path / "run")
    monkeypatch.setattr("slimrank.pipeline.stages.model_probe.ModelProbe._block", None)
    again = allocated(id, run_dir=tmp_path / "run")
    assert again.plan == first.plan
    other = allocated(id, run_dir=tmp_path / "run", keep_ratio=0.8)
    assert other.plan.parameters > first.plan.parameters


def test_interrupted_measurements_go_on(tmp_path, monkeypatch):
    from slimrank.pipeline.stages.model_probe import ModelProbe

    whole = allocated("lems")
    real, blocks = ModelProbe._block, []

    def interrupted(self, index, *rest):
        blocks.append(index)
        if index == 2:
            raise KeyboardInterrupt
        return real(self, index, *rest)

    monkeypatch.setattr(ModelProbe, "_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        allocated("lems", run_dir=tmp_path / "run")
    measured = []
    monkeypatch.setattr(
        ModelProbe, "_block", lambda self, i, h, cuts: (measured.extend(cuts), real(self, i, h, cuts))[1]
    )
    assert allocated("lems", run_dir=tmp_path / "run").plan == whole.plan
    assert blocks == [0, 1, 2]
    assert {path.split(".")[2] for path, _ in measured} == {"2"}


@pytest.mark.parametrize(
    "id, options, plans", [("lems", {"search": True, "plans": 6}, 7 + 6), ("atp", {"trials": 5}, 5)]
)
def test_plans_that_were_measured_before_an_interruption_are_not_again(id, options, plans, tmp_path, monkeypatch):
    from slimrank.pipeline.stages.model_probe import ModelProbe

    whole = allocated(id, allocation_options=options)
    real, measured = ModelProbe._joint, []

    def interrupted(self, ranks):
        if len(measured) == plans - 2:
            measured.append("interruption")
            raise KeyboardInterrupt
        measured.append(dict(ranks))
        return real(self, ranks)

    monkeypatch.setattr(ModelProbe, "_joint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        allocated(id, allocation_options=options, run_dir=tmp_path / "run")
    resumed = allocated(id, allocation_options=options, run_dir=tmp_path / "run")
    measured.remove("interruption")
    assert all(measured.count(plan) == 1 for plan in measured)
    assert len(measured) <= plans
    assert resumed.plan == whole.plan
    assert resumed.report["allocation"] == whole.report["allocation"]


@pytest.mark.parametrize("id", ["fermigrad", "dobi"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gradients_through_weights_that_are_only_there_for_the_forward_pass(id, name):
    """On a CPU 16-bit weights are cast for a while, as on an accelerator they are brought there for a while."""
    settings = {"evaluation": None, "form": "pivot"}
    streamed, resident = (
        allocated(id, tiny_model(name).bfloat16(), resident=resident, **settings) for resident in (False, True)
    )
    assert streamed.plan == resident.plan
    assert all(p.dtype == torch.bfloat16 for p in streamed.model.parameters())


@pytest.mark.parametrize("id", ["lems", "ada_cr", "fermigrad", "dobi"])
def test_an_allocation_that_was_found_is_not_sought_again(id, tmp_path, monkeypatch):
    first = allocated(id, run_dir=tmp_path / "run")
    for name in ("_block", "_joint", "influence", "loss"):
        monkeypatch.setattr(f"slimrank.pipeline.stages.model_probe.ModelProbe.{name}", None)
    again = allocated(id, run_dir=tmp_path / "run")
    assert again.plan == first.plan
    for part in ("allocation", "notes"):
        assert again.report[part] == first.report[part]


@pytest.mark.parametrize(
    "changes",
    [
        {"keep_ratio": 0.7},
        {"allocation_options": {"steps": 3}},
        {"allocation": "dobi", "allocation_options": {"steps": 2}},
        {"ranks": {"q_proj": "3..5"}},
        {"rank_multiple": 2},
        {"form": "pivot"},
        {"search_samples": SEARCH - 1},
        {"method": "asvd"},
    ],
)
def test_an_allocation_that_was_found_serves_no_other_request(changes, tmp_path):
    allocated("fermigrad", run_dir=tmp_path / "run")
    kept = allocated("fermigrad", run_dir=tmp_path / "run", **changes)
    fresh = allocated("fermigrad", **changes)
    assert kept.plan == fresh.plan
    assert kept.report["allocation"] == fresh.report["allocation"]


def test_limits_in_a_recipe():
    ranks = {"*.mlp.*": "3..5", "layers.0.self_attn.q_proj": 7, "layers.1.self_attn.o_proj": "dense"}
    plan = allocated("spectrum", ranks=ranks).plan.targets
    for path, target in plan.items():
        if ".mlp." in path:
            assert 3 <= target.rank <= 5
    assert plan["model.layers.0.self_attn.q_proj"].rank == 7
    assert plan["model.layers.1.self_attn.o_proj"].rank == "dense"


@pytest.mark.parametrize(
    "ranks, rank",
    [
        ({"layers.1.*.q_proj": 3}, 3),
        ({"layers.1.*.q_proj": "dense"}, "dense"),
        ({"layers.0.*.q_proj": "2..5", "layers.1.*.q_proj": "5.."}, 5),
    ],
)
def test_limits_of_any_layer_that_shares_a_factor_count(ranks, rank):
    plan = allocated("spectrum", method="basis_sharing", ranks=ranks, keep_ratio=0.8).plan.targets
    assert plan["model.layers.1.self_attn.q_proj"].shares == "model.layers.0.self_attn.q_proj"
    assert {plan[f"model.layers.{b}.self_attn.q_proj"].rank for b in range(2)} == {rank}


@pytest.mark.parametrize("second", ["6..", "dense"])
def test_limits_of_layers_that_share_a_factor_must_overlap(second):
    ranks = {"layers.0.*.q_proj": "2..5", "layers.1.*.q_proj": second}
    with pytest.raises(PlanError, match=r"'.*\.0\..*q_proj' and '.*\.1\..*q_proj', which share a factor, no common"):
        allocated("spectrum", method="basis_sharing", ranks=ranks)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"ranks": {"q_porj": 3}}, RecipeError, "pattern 'q_porj' of 'ranks' matches no target"),
        ({"ranks": {"q_proj": "a"}}, RecipeError, "is not a rank, MIN..MAX or dense"),
        ({"ranks": {"q_proj": 0}}, RecipeError, "'0' for 'q_proj': the smallest rank is 1"),
        ({"ranks": {"q_proj": "0..5"}}, RecipeError, r"'0\.\.5' for 'q_proj': the smallest rank is 1"),
        ({"ranks": {"q_proj": "500..600"}}, PlanError, r"no multiple of 1 is a rank of 'model\.layers\.0"),
        ({"ranks": {"*": "dense"}}, BudgetError, "smallest ranks allowed store"),
        ({"allocation_options": {"anchors": [1.5]}}, RecipeError, "less than 1"),
        ({"allocation_options": {"anchros": [0.5]}}, RecipeError, "did you mean 'anchors'"),
        ({"allocation": "lmes"}, RecipeError, "did you mean 'lems'"),
        ({"allocation": "from_plan", "allocation_options": {"file": "none.json"}}, PlanError, "cannot be read"),
        (
            {"allocation": "shared", "allocation_options": {"monotone": True}},
            RecipeError,
            "cannot be combined with ranks shared",
        ),
        (
            {"allocation": "shared", "ranks": {"layers.0.*.q_proj": 3, "layers.1.*.q_proj": 5}},
            PlanError,
            "no rank is allowed for all of",
        ),
        ({"keep_ratio": 0.001}, BudgetError, "keep_ratio of at least"),
        ({"allocation_options": {"block_floor": 0.8, "block_cap": 0.5}}, BudgetError, "block_floor of at most 0.5"),
        ({"allocation_options": {"block_cap": 0.01}}, BudgetError, "block 0 keeps at least"),
    ],
)
def test_bad_input_is_told_before_any_work(changes, error, message, monkeypatch):
    monkeypatch.setattr("slimrank.pipeline.stages.calibrate.decompose", None)
    with pytest.raises(error, match=message):
        allocated("lems", **{"allocation_options": {}, **changes})


def test_plans_that_do_not_fit(tmp_path):
    first = allocated("spectrum")
    content = first.plan.model_copy(update={"targets": dict(list(first.plan.targets.items())[1:])})
    content.save(tmp_path / "short.json")
    first.plan.save(tmp_path / "plan.json")
    plan = {"allocation": "from_plan", "allocation_options": {"file": str(tmp_path / "plan.json")}}
    assert allocated("from_plan", **plan).plan.targets == first.plan.targets
    with pytest.raises(BudgetError, match="over the budget"):
        allocated("from_plan", **plan, keep_ratio=0.4)
    short = {"allocation": "from_plan", "allocation_options": {"file": str(tmp_path / "short.json")}}
    other = {path: t.model_copy(update={"shape": (7, 7)}) for path, t in first.plan.targets.items()}
    first.plan.model_copy(update={"targets": other}).save(tmp_path / "other.json")
    shapes = {"allocation": "from_plan", "allocation_options": {"file": str(tmp_path / "other.json")}}
    with pytest.raises(PlanError, match=r"is \(7, 7\) in the plan and"):
        allocated("from_plan", **shapes)
    with pytest.raises(PlanError, match="shares the factor of no other in the plan"):
        allocated("from_plan", method="basis_sharing", **plan)
    allocated("spectrum", method="basis_sharing").plan.save(tmp_path / "shared.json")
    shared = {"allocation": "from_plan", "allocation_options": {"file": str(tmp_path / "shared.json")}}
    assert allocated("from_plan", method="basis_sharing", **shared).plan.targets
    with pytest.raises(PlanError, match="and of no other in the method"):
        allocated("from_plan", **shared)
    with pytest.raises(PlanError, match=r"lacks 1 targets, e\.g\. 'model\.layers\.0\.self_attn\.q_proj'"):
        allocated("from_plan", **short)


def test_a_divergence_that_is_not_finite_names_the_layer(monkeypatch):
    from slimrank.models.divergence import Scorer

    monkeypatch.setattr(Scorer, "score", lambda self, finals: [(float("nan"), 1.0)] * len(finals))
    with pytest.raises(NonFiniteError, match=r"divergence of 'model\.layers\.0\.self_attn\.q_proj' at rank 2"):
        allocated("lems")


def test_plan_computes_what_the_allocation_needs_and_compress_goes_on_from_there(capsys, tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n".join(TEXT))
    shared = [
        folder, "--keep", 0.6, "--allocation", "lems", "--samples", SAMPLES, "--seq-len", SEQ_LEN, "--search-samples",
        SEARCH, "--calibration", tmp_path / "text.txt", "--run-dir", tmp_path / "run",
    ]  # fmt: skip
    code, shown, error = run(capsys, "plan", *shared, "--save", tmp_path / "plan.json")
    assert code == 0, error
    rows = [line.strip("│ ").split("│") for line in shown.splitlines() if re.match(r"│ +\d+ │", line)]
    assert len(rows) == 3
    plan = RankPlan.load(tmp_path / "plan.json")
    for block, row in enumerate(rows):
        for name, cell in zip(("q_proj", "k_proj", "v_proj", "o_proj"), row[1:5], strict=True):
            target = plan.targets[f"model.layers.{block}.self_attn.{name}"]
            kept = 100 * target.cost(plan.stored_as) / (target.shape[0] * target.shape[1])
            assert cell.strip() == ("--" if target.rank == "dense" else f"{kept:.0f}")
    assert "predicted error" in shown
    assert "no allowed plan is better by more than" in shown
    (mine,) = re.findall(r"0\.60 +([\d.e-]+) .* <- this plan", shown)
    record = json.loads(run(capsys, "plan", *shared, "--json")[1])
    assert record["allocation"]["id"] == "lems"
    assert float(mine) == pytest.approx(record["allocation"]["predicted"], rel=1e-3)
    assert len(record["allocation"]["additivity"]["measured"]) == 20
    assert record["plan"] == plan.model_dump(mode="json")
    monkeypatch.setattr("slimrank.pipeline.stages.model_probe.ModelProbe._block", None)
    code, shown, error = run(capsys, "compress", *shared, "--no-eval", "--json", "--out", tmp_path / "out")
    assert code == 0, error
    made = json.loads(shown)
    assert made["allocation"] == record["allocation"]
    assert RankPlan.load(tmp_path / "out" / "plan.json").targets == plan.targets
    followed = compress(plan=str(tmp_path / "plan.json"), keep_ratio=None)
    assert followed.plan == plan
    report = (tmp_path / "out" / "report.md").read_text()
    assert "Ranks by `lems`" in report
    assert "rank correlation" in report


def test_flags_of_the_command_line(capsys, tmp_path):
    folder = save_tiny(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n".join(TEXT))
    code, shown, error = run(
        capsys, "compress", folder, "--keep", 0.6, "--no-eval", "--json", "--out", tmp_path / "out",
        "--samples", SAMPLES, "--seq-len", SEQ_LEN, "--calibration", tmp_path / "text.txt",
        "--allocation", "spectrum", "--allocation-option", "scale=relative",
        "--rank", "*.mlp.*=3..6", "--rank", "o_proj=dense", "--rank-multiple", 3,
    )  # fmt: skip
    assert code == 0, error
    record = json.loads(shown)
    assert record["allocation"]["scale"] == "relative"
    for row in record["targets"]:
        if ".mlp." in row["path"]:
            assert row["rank"] in (3, 6)
        if "o_proj" in row["path"]:
            assert row["rank"] == "dense"


def test_additivity_where_errors_do_add_up():
    given = problem(0.6)
    curves = ALLOCATORS.get("lems").configured({}).allocate(given).curves
    found = additivity(given, curves, 12)
    assert found.predicted == pytest.approx(found.measured, rel=1e-6)
    assert found.spearman == pytest.approx(1.0)
    shuffled = [curve.scaled(float(1 + 50 * (i % 3 == 0))) for i, curve in enumerate(curves)]
    assert additivity(given, shuffled, 12).spearman < 0.99


def test_plans_that_are_all_the_same_have_no_rank_correlation(recwarn):
    given = problem(1.0)
    found = additivity(given, ALLOCATORS.get("lems").configured({}).allocate(given).curves, 3)
    assert found.spearman is None
    assert not recwarn.list


@pytest.mark.parametrize("dropped, bent", [(None, False), (5, False), (1000, True)])
def test_more_positions_than_can_be_dropped_are_told(dropped, bent):
    notes = allocated("lems", allocation_options={"dropped": dropped, "plans": 0}).report["notes"]
    note = f"allocation: of a window only {SEQ_LEN - 2} positions can be dropped, not 1000"
    assert (note in notes) == bent


@pytest.mark.parametrize("gamma", [float("inf"), float("nan"), 1e7])
def test_a_bias_without_bounds_is_refused(gamma):
    with pytest.raises(RecipeError, match="gamma"):
        allocated("lems", allocation_options={"gamma": gamma})


# search windows --------------------------------------------------------------------------------------------------


def test_search_windows_are_apart_from_those_that_calibrate():
    tokens = torch.arange(4000)
    taken = draw_windows(tokens, 20, 30, seed=5)
    (windows,), apart = draw_apart(tokens, [50], 20, 30, seed=5)
    assert apart
    assert windows.shape == (50, 30)
    assert not set(taken.flatten().tolist()) & set(windows.flatten().tolist())


def test_windows_of_several_uses_are_apart_from_each_other():
    tokens = torch.arange(4000)
    drawn, apart = draw_apart(tokens, [8, 0, 12], 20, 30, seed=5)
    assert apart
    assert [len(windows) for windows in drawn] == [8, 0, 12]
    sets = [set(w.flatten().tolist()) for w in (draw_windows(tokens, 20, 30, seed=5), drawn[0], drawn[2])]
    assert len(set.union(*sets)) == sum(map(len, sets))
    (alone,), _ = draw_apart(tokens, [8], 20, 30, seed=5)
    assert torch.equal(alone, drawn[0])


def test_a_text_that_is_too_short_says_so():
    (windows,), apart = draw_apart(torch.arange(70), [4], 20, 30, seed=5)
    assert not apart
    assert windows.shape == (4, 30)
    result = allocated("lems", calibration=["word " * 12])
    assert any("overlap" in note for note in result.report["notes"])


def test_targets_of_other_blocks_have_the_same_role():
    from slimrank.models.targets import role_of

    targets = find_targets(tiny_model())
    roles = [role_of(t, targets.blocks_path) for t in targets]
    assert roles[:7] == roles[7:14]
    assert roles[0] == "self_attn.q_proj"
