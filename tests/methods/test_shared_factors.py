"""Factors that several layers share: ranks, saving, loading."""

import os
import subprocess
import sys
import textwrap

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
    SHARED,
    TEXT,
    assert_same,
    calibration_windows,
    compress,
    heard,
    logits,
    low_rank,
    product,
    result_of,
)
from slimrank.budget.rank_plan import RankPlan
from slimrank.errors import PlanError, RecipeError
from slimrank.layers.forms import PAIR


def groups_of(plan):
    """First path -> paths that share its factor."""
    found = {}
    for path, target in plan.targets.items():
        found.setdefault(target.shares or path, []).append(path)
    return found


def test_groups_across_layers_and_within_a_block():
    layers = groups_of(compress(method="basis_sharing").plan)
    assert layers["model.layers.0.mlp.up_proj"] == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    assert layers["model.layers.2.mlp.up_proj"] == ["model.layers.2.mlp.up_proj"]
    assert layers["model.layers.1.mlp.down_proj"] == ["model.layers.1.mlp.down_proj"]
    block = groups_of(compress(method="basis_sharing", method_options=SHARED["block"]).plan)
    assert [p.rpartition(".")[2] for p in block["model.layers.1.self_attn.q_proj"]] == ["q_proj", "k_proj", "v_proj"]
    assert [p.rpartition(".")[2] for p in block["model.layers.1.mlp.gate_proj"]] == ["gate_proj", "up_proj"]
    both = groups_of(compress(method="basis_sharing", method_options=SHARED["both"]).plan)
    assert len(both["model.layers.0.self_attn.q_proj"]) == 9
    chosen = compress(method="basis_sharing", method_options={"share": ["down_proj"], "layers": 3}).plan
    assert [len(g) for g in groups_of(chosen).values() if len(g) > 1] == [3]


def test_members_that_read_one_input_get_the_optimum_of_their_stack():
    """Sharing within a block is svd_llm of the stacked weight, exactly: by full SVD of the whitened stack."""
    result, dense = compress(method="basis_sharing", method_options=SHARED["block"]), tiny_model()
    names = [f"model.layers.0.self_attn.{n}_proj" for n in "qkv"]
    x = heard(dense, names[:1], calibration_windows())[0][names[0]]
    w = torch.cat([dense.get_submodule(n).weight.detach().double() for n in names])
    rank = result.plan.targets[names[0]].rank
    u, sigma, _ = torch.linalg.svd(w @ x.T, full_matrices=False)
    ours = torch.cat([product(result.model.get_submodule(n)) for n in names])
    expected = u[:, :rank] @ u[:, :rank].T @ w
    assert float(((ours - expected) @ x.T).norm() / (w @ x.T).norm()) < 1e-4
    tail = float(sigma[rank:].norm() / sigma.norm())
    assert result.report["targets"][0]["relative_error"] == pytest.approx(tail, rel=1e-4)


@pytest.mark.parametrize("refine", [None, "update"])
@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("model", ["llama", "gpt2", "qwen2"])
def test_members_hold_one_and_the_same_factor(model, kind, refine):
    if (model, kind) == ("gpt2", "block"):
        with pytest.raises(RecipeError, match="finds no layers"):
            compress(model, method="basis_sharing", method_options=SHARED[kind])
        return
    result = compress(model, method="basis_sharing", method_options=SHARED[kind], refine=refine)
    groups = groups_of(result.plan)
    assert max(map(len, groups.values())) > 1
    layers = low_rank(result.model)
    for paths in groups.values():
        assert len({id(layers[path].A.weight) for path in paths}) == 1
        assert len({id(layers[path].B.weight) for path in paths}) == len(paths)
    assert len({id(layer.A.weight) for layer in layers.values()}) == len(groups)


def test_update_leaves_the_shared_factor_alone():
    plain, refined = result_of("basis_sharing", "llama"), compress(method="basis_sharing", refine="update")
    for path, layer in low_rank(refined.model).items():
        assert torch.equal(layer.A.weight, plain.model.get_submodule(path).A.weight)
    assert any(not torch.equal(layer.B.weight, plain.model.get_submodule(p).B.weight)
               for p, layer in low_rank(refined.model).items())  # fmt: skip


def share_of(paths, plan):
    m = sum(plan.targets[p].shape[0] for p in paths)
    n = plan.targets[paths[0]].shape[1]
    return m, n


@pytest.mark.parametrize("keep", [0.8, 0.6, 0.3])
@pytest.mark.parametrize("kind", SHARED)
def test_groups_keep_the_ratio_asked_for(kind, keep):
    plan = compress(method="basis_sharing", method_options=SHARED[kind], keep_ratio=keep).plan
    assert plan.keep_ratio <= keep
    total = 0
    for paths in groups_of(plan).values():
        m, n = share_of(paths, plan)
        rank = plan.targets[paths[0]].rank
        assert {plan.targets[p].rank for p in paths} == {rank}
        assert PAIR.parameters(m, n, rank) <= keep * m * n < PAIR.parameters(m, n, rank + 1)
        total += PAIR.parameters(m, n, rank)
    assert plan.parameters == total


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Models with shared factors as folders: name -> (folder, result)."""
    made = {}
    for name, kind in (("llama", "layers"), ("qwen2", "both"), ("gpt2", "layers")):
        folder = tmp_path_factory.mktemp(name)
        save_tiny(folder / "model", name)
        result = slimrank.compress(
            folder / "model", out=folder / "out", keep_ratio=KEEP, calibration=TEXT, evaluation=None, samples=SAMPLES,
            seq_len=SEQ_LEN, method="basis_sharing", method_options=SHARED[kind],
        )  # fmt: skip
        torch.save(logits(result.model), folder / "expected.pt")
        made[name] = folder, result
    return made


@pytest.fixture(params=["llama", "qwen2", "gpt2"])
def shared(saved, request):
    return saved[request.param]


def test_a_shared_factor_is_counted_and_stored_once(shared):
    folder, result = shared
    plan = RankPlan.load(folder / "out" / "plan.json")
    assert plan == result.plan
    with safe_open(folder / "out" / "model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    factors = {k: t for k, t in stored.items() if k.endswith((".A.weight", ".B.weight"))}
    assert sum(k.endswith(".A.weight") for k in factors) == len(groups_of(plan)) < len(plan.targets)
    assert sum(k.endswith(".B.weight") for k in factors) == len(plan.targets)
    assert sum(t.numel() * t.element_size() for t in factors.values()) == 4 * plan.parameters
    assert sum(t.numel() for t in stored.values()) == result.report["size"]["parameters_after"]
    written = (folder / "out" / "model.safetensors").stat().st_size
    assert 0 <= written - 4 * result.report["size"]["parameters_after"] < 16384  # the header
    assert result.report["size"]["bytes_after"] == written


def test_a_loaded_model_shares_its_factors(shared, tmp_path):
    folder, result = shared
    loaded, info = AutoModelForCausalLM.from_pretrained(folder / "out", output_loading_info=True)
    assert not any(info.values())
    expected = torch.load(folder / "expected.pt")
    for again in (folder / "out", tmp_path / "again", tmp_path / "third"):
        model = AutoModelForCausalLM.from_pretrained(again)
        assert torch.equal(logits(model), expected)
        layers = low_rank(model)
        for paths in groups_of(result.plan).values():
            assert len({id(layers[path].A.weight) for path in paths}) == 1
        assert sum(p.numel() for p in model.parameters()) == result.report["size"]["parameters_after"]
        model.save_pretrained(tmp_path / ("again" if again == folder / "out" else "third"))
    sizes = {(p / "model.safetensors").stat().st_size for p in (folder / "out", tmp_path / "again")}
    assert len(sizes) == 1
    ties = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert ties == result.model.config.tie_word_embeddings


def python(code, *arguments):
    """Run code in a process of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment)


LOAD = """
    import sys
    way, *folders = sys.argv[1:]
    if way == "import slimrank":
        import slimrank
    else:
        sys.modules["slimrank"] = None  # importing it fails
    import torch
    from transformers import AutoModelForCausalLM
    for folder in folders:
        for place in ("/out", "/" + way):
            model = AutoModelForCausalLM.from_pretrained(folder + place, trust_remote_code=way == "remote code")
            with torch.no_grad():
                logits = model(input_ids=torch.arange(24).reshape(2, 12)).logits
            assert torch.equal(logits, torch.load(folder + "/expected.pt"))
            factors = [m.A.weight for m in model.modules() if type(m).__name__ == "LowRankLinear"]
            print(len({id(f) for f in factors}), len(factors))
            model.save_pretrained(folder + "/" + way)
"""


@pytest.mark.parametrize("way", ["import slimrank", "remote code"])
def test_shared_factors_in_another_process(saved, way):
    done = python(LOAD, way, *(folder for folder, _ in saved.values()))
    assert done.returncode == 0, done.stderr
    expected = [f"{len(groups_of(r.plan))} {len(r.plan.targets)}" for _, r in saved.values() for _ in range(2)]
    assert [line for line in done.stdout.splitlines() if line[:1].isdigit()] == expected


def test_plans_of_shared_factors(tmp_path):
    first = result_of("basis_sharing", "llama")
    first.plan.save(tmp_path / "plan.json")
    options = {"plan": str(tmp_path / "plan.json"), "keep_ratio": None}
    assert_same(compress(method="basis_sharing", **options), first)
    with pytest.raises(PlanError, match="shares the factor of"):
        compress(method="svd_llm", **options)
    with pytest.raises(PlanError, match="shares the factor of"):
        compress(method="basis_sharing", method_options=SHARED["block"], **options)
    result_of("svd_llm", "llama").plan.save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="shares the factor of no other in the plan"):
        compress(method="basis_sharing", **options)


def test_members_of_a_group_have_one_rank(tmp_path):
    content = result_of("basis_sharing", "llama").plan.model_dump()
    content["targets"]["model.layers.1.mlp.up_proj"]["rank"] -= 1
    with pytest.raises(PlanError, match="another rank than"):
        compress(method="basis_sharing", plan=RankPlan.model_validate(content), keep_ratio=None)
