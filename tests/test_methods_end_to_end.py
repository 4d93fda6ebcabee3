"""Every method and refiner through `slimrank.compress` on tiny models: results, resuming, saving, refusals."""

import functools
import json
import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

import slimrank
from helpers import byte_tokenizer, save_tiny, text, tiny_model
from slimrank.allocate.plan import RankPlan
from slimrank.allocate.problem import Item, Problem
from slimrank.allocate.registry import ALLOCATORS
from slimrank.calibration.windows import draw_apart, draw_spread, draw_windows, tokenise
from slimrank.cli import main
from slimrank.decompose.registry import DECOMPOSERS, Configured
from slimrank.errors import DataError, ModelError, PlanError, RecipeError
from slimrank.estimate import Machine
from slimrank.layers import LowRankLinear
from slimrank.layers.dense import weight_of
from slimrank.linalg.cost import pair_cost
from slimrank.models.structure import find_blocks
from slimrank.models.targets import find_targets
from slimrank.pipeline.held_out import HeldOut
from slimrank.progress import Progress
from slimrank.recipe import Recipe
from slimrank.refine.registry import REFINERS
from slimrank.statistics.streams import StreamSums

TEXT = (text(),)
METHODS = list(DECOMPOSERS.all())
BACKWARD = [name for name, method in DECOMPOSERS.all().items() if method.takes == "backward"]
FREE = [n for n, d in DECOMPOSERS.all().items() if d.takes != "none" and not d.needs & {"rank", "projectors"}]
SHARED = {"layers": {"layers": 2}, "block": {"layers": 1, "within": True}, "both": {"layers": 3, "within": True}}
SAMPLES, SEQ_LEN, KEEP = 5, 24, 0.6
IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Nothing here depends on how fast this machine is, or on memory given back; both take longer than the tests."""
    monkeypatch.setattr("slimrank.models.paging._weight_files", list)
    monkeypatch.setattr("slimrank.pipeline.job.measure_machine", lambda device: Machine(1e9, 1e9))
    monkeypatch.setattr("slimrank.dry_run.measure_machine", lambda device: Machine(1e9, 1e9))


PLAIN = {"method": "svd_llm"}


def compress(model="llama", **changes):
    given = tiny_model(model) if isinstance(model, str) else model
    options = {"keep_ratio": KEEP, "calibration": TEXT, "evaluation": None, "samples": SAMPLES, "seq_len": SEQ_LEN}
    return slimrank.compress(given, byte_tokenizer(), **{**options, **PLAIN, "batch_size": 2, **changes})


@functools.cache
def result_of(method, model):
    """What others only look at."""
    return compress(model, method=method)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def assert_same(first, second):
    """The same bits in every parameter, and the same report but for the time it took."""
    one, other = (dict(result.model.named_parameters()) for result in (first, second))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    for part in ("targets", "notes", "size"):
        assert first.report[part] == second.report[part]


def product(layer):
    return layer.B.weight.detach().double() @ layer.A.weight.detach().double()


def low_rank(model):
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, LowRankLinear)}


def interrupting(stage, after, notes=None):
    """Progress that raises when so many steps of a stage are done."""
    progress, now = Progress(), {}

    def step(done=1):
        now["done"] += done
        if now["name"] == stage and now["done"] >= after:
            raise KeyboardInterrupt

    progress.stage = lambda name, steps: now.update(name=name, done=0)
    progress.step = step
    progress.note = (notes if notes is not None else []).append
    return progress


def noting(notes):
    progress = Progress()
    progress.note = notes.append
    return progress


def forbid_passes(monkeypatch):
    """Any pass over the calibration text fails from here on."""
    for name in ("embed", "step", "run"):
        monkeypatch.setattr(f"slimrank.models.blocks.BlockRunner.{name}", None)
    monkeypatch.setattr("slimrank.pipeline.decomposing.whole_model_gradients", None)


# every method --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_results_are_finite_and_as_small_as_planned(method, model):
    result = result_of(method, model)
    targets, size = result.report["targets"], result.report["size"]
    assert len(targets) == len(find_targets(tiny_model(model)))
    for row in targets:
        assert 0 < row["relative_error"] < 1
        assert row["rank"] == result.plan.targets[row["path"]].rank < min(row["shape"])
    stored = {id(p): p for layer in low_rank(result.model).values() for p in (layer.A.weight, layer.B.weight)}
    assert sum(p.numel() for p in stored.values()) == result.plan.parameters == size["linears_after"]
    assert sum(row["parameters_after"] for row in targets) == result.plan.parameters
    assert sum(p.numel() for p in result.model.parameters()) == size["parameters_after"]
    assert 0.5 < size["keep_ratio"] <= KEEP
    assert bool(torch.isfinite(logits(result.model)).all())
    assert not torch.equal(logits(result.model), logits(tiny_model(model)))


@pytest.mark.parametrize("method", METHODS)
def test_two_runs_give_the_same_bits(method):
    assert_same(compress(method=method), result_of(method, "llama"))


def test_methods_differ():
    """Otherwise the tests of single methods could all be tests of one."""
    products = {m: product(result_of(m, "llama").model.model.layers[1].mlp.down_proj) for m in METHODS}
    same = [(a, b) for a in METHODS for b in METHODS if a < b and torch.allclose(products[a], products[b], atol=1e-5)]
    assert set(same) == {
        (a, b) for a, b in [("basis_sharing", "drone"), ("basis_sharing", "svd_llm"), ("basis_sharing", "svd_llm_v2"),
                            ("drone", "svd_llm"), ("drone", "svd_llm_v2"), ("svd_llm", "svd_llm_v2")]
    }  # fmt: skip


@pytest.mark.parametrize("model", ["gpt2", "opt", "qwen2"])
@pytest.mark.parametrize("method", METHODS)
def test_biases_are_kept_to_the_bit(method, model):
    dense = tiny_model(model)
    biased = 0
    for path, layer in low_rank(result_of(method, model).model).items():
        original = dense.get_submodule(path).bias
        assert (layer.bias is None) == (original is None)
        assert layer.A.bias is None
        if original is not None:
            assert torch.equal(layer.bias, original)
            biased += 1
    assert biased >= 9


@pytest.mark.parametrize("method", METHODS)
def test_models_in_16_bits(method):
    result = compress(tiny_model().to(torch.float16), method=method)
    assert {p.dtype for p in result.model.parameters()} == {torch.float16}
    assert all(0 < row["relative_error"] < 1 for row in result.report["targets"])
    assert bool(torch.isfinite(logits(result.model).float()).all())
    wide = result_of(method, "llama").model
    for path, layer in low_rank(result.model).items():
        plain = tiny_model().get_submodule(path).weight.detach().double()
        assert float((product(layer) - product(wide.get_submodule(path))).norm() / plain.norm()) < 0.25


@pytest.mark.parametrize("method", METHODS)
def test_every_layer_sees_exactly_the_calibration_tokens(method, monkeypatch):
    """5 windows in batches of 2: the last batch is short, and none is dropped."""
    seen, solve = [], Configured.solve

    def spy(self, weight, statistics):
        seen.append(statistics)
        return solve(self, weight, statistics)

    monkeypatch.setattr(Configured, "solve", spy)
    compress(method=method)
    needs = DECOMPOSERS.get(method).needs
    assert len(seen) == (16 if method == "basis_sharing" else 21)
    for statistics in seen if needs else []:
        members = statistics.tokens // (SAMPLES * SEQ_LEN)
        assert statistics.tokens == members * SAMPLES * SEQ_LEN
        assert members in ((1, 2) if method == "basis_sharing" else (1,))
        if statistics.inputs is not None:
            assert statistics.inputs.count == statistics.tokens
        if "channels" in needs:
            assert statistics.channels.count == statistics.tokens
        if "gradients" in needs:
            assert len(statistics.samples) == 2  # 4 windows are one sample


def steps_of(**options):
    """Steps announced and done, by stage."""
    progress, found, now = Progress(), {}, []

    def stage(name, steps):
        now[:] = [name]
        found[name] = [steps, 0]

    def step(done=1):
        found[now[0]][1] += done

    progress.stage, progress.step = stage, step
    compress(progress=progress, **options)
    return found


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("method", ["svd", "svd_llm", "basis_sharing", "kfac_svd"])
def test_as_many_steps_are_done_as_announced(method, resident):
    found = steps_of(method=method, resident=resident, refine="update")
    assert {"calibrate and decompose", "cut and refine factors"} <= found.keys()
    assert all(announced == done for announced, done in found.values())


# resuming ------------------------------------------------------------------------------------------------------


def interrupted_then_resumed(folder, stage, after, model="llama", **options):
    notes = []
    make = (lambda: tiny_model(model)) if isinstance(model, str) else model
    with pytest.raises(KeyboardInterrupt):
        compress(make(), run_dir=folder, progress=interrupting(stage, after), **options)
    return compress(make(), run_dir=folder, progress=noting(notes), **options), notes


@pytest.mark.parametrize("method", METHODS)
def test_resuming_gives_the_same_bits(method, tmp_path):
    after = 5 if method in BACKWARD else 2
    resumed, notes = interrupted_then_resumed(tmp_path, "calibrate and decompose", after, method=method)
    assert_same(resumed, result_of(method, "llama"))
    assert notes == [f"resuming at block {2} of 3"]


@pytest.mark.parametrize(
    "method, after, resumes",
    [
        ("svd_llm", 1, 1), ("svd_llm", 3, 3),
        ("basis_sharing", 1, 0), ("basis_sharing", 2, 2), ("basis_sharing", 3, 3),
        ("dobi_svd", 1, 1), ("dobi_svd", 3, 3),
        ("kfac_svd", 1, 0), ("kfac_svd", 3, 0), ("kfac_svd", 4, 1), ("kfac_svd", 6, 0),
    ],
)  # fmt: skip
def test_resuming_anywhere_gives_the_same_bits(method, after, resumes, tmp_path):
    resumed, notes = interrupted_then_resumed(tmp_path, "calibrate and decompose", after, method=method)
    assert_same(resumed, result_of(method, "llama"))
    assert notes == ([f"resuming at block {resumes} of 3"] if resumes else [])


@pytest.mark.parametrize("method", ["basis_sharing", "gfwsvd"])
@pytest.mark.parametrize("times", [2, 3])
def test_interrupted_again_and_again(method, times, tmp_path):
    for after in range(1, times + 1):
        with pytest.raises(KeyboardInterrupt):
            compress("gpt2", method=method, run_dir=tmp_path, progress=interrupting("calibrate and decompose", after))
    assert_same(compress("gpt2", method=method, run_dir=tmp_path), result_of(method, "gpt2"))


@pytest.mark.parametrize("after", [2, 4])
def test_a_resident_backward_pass_starts_again(after, tmp_path):
    options = {"method": "kfac_svd", "resident": True}
    resumed, _ = interrupted_then_resumed(tmp_path, "calibrate and decompose", after, **options)
    assert_same(resumed, compress(**options))


@pytest.mark.parametrize("method", ["svd_llm", "kfac_svd", "basis_sharing"])
def test_an_interrupt_while_cutting(method, tmp_path):
    resumed, _ = interrupted_then_resumed(tmp_path, "cut factors", 2, method=method)
    assert_same(resumed, result_of(method, "llama"))


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("method", FREE)
def test_another_budget_needs_no_new_calibration(method, resident, tmp_path, monkeypatch):
    first = compress(method=method, resident=resident, run_dir=tmp_path)
    forbid_passes(monkeypatch)
    again = compress(method=method, resident=resident, run_dir=tmp_path, keep_ratio=0.4)
    monkeypatch.undo()
    assert_same(again, compress(method=method, resident=resident, keep_ratio=0.4))
    assert again.plan.parameters < first.plan.parameters


@pytest.mark.parametrize("method", ["dobi_svd", "coala"])
def test_methods_that_depend_on_ranks_calibrate_again(method, tmp_path):
    compress(method=method, run_dir=tmp_path)
    assert_same(compress(method=method, run_dir=tmp_path, keep_ratio=0.4), compress(method=method, keep_ratio=0.4))


@pytest.mark.parametrize(
    "method, options",
    [
        ("asvd", {"alpha": 0.9}), ("kfac_svd", {"trim": 0.3}), ("kfac_svd", {"clip": [0.9, 1.1]}),
        ("gfwsvd", {"accumulate": 2}), ("basis_sharing", {"layers": 3}),
    ],
)  # fmt: skip
def test_other_options_are_not_served_from_the_run(method, options, tmp_path):
    compress(method=method, run_dir=tmp_path)
    again = compress(method=method, method_options=options, run_dir=tmp_path)
    assert_same(again, compress(method=method, method_options=options))
    ours, default = (product(r.model.model.layers[0].mlp.up_proj) for r in (again, result_of(method, "llama")))
    assert ours.shape == default.shape
    assert not torch.allclose(ours, default, atol=1e-5)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["kfac_svd", "svd_llm", "fwsvd", "gfwsvd", "dobi_svd", "basis_sharing"])
def test_resident_and_streamed_agree(method, model):
    resident = compress(model, method=method, resident=True)
    for path, layer in low_rank(result_of(method, model).model).items():
        other, one = product(resident.model.get_submodule(path)), product(layer)
        assert float((one - other).norm() / one.norm()) < 1e-3
    ours, streamed = ([r["relative_error"] for r in x.report["targets"]] for x in (resident, result_of(method, model)))
    assert ours == pytest.approx(streamed, rel=1e-3)


# refinement ----------------------------------------------------------------------------------------------------


def first_layers(model):
    """The first layer of every block: what it reads depends on the blocks before it alone."""
    found = {}
    for target in find_targets(model):
        found.setdefault(target.block, target.path)
    return list(found.values())


ENTRY, EXIT = ("o_proj", "attn.c_proj"), ("down_proj", "mlp.c_proj")  # they add to the residual stream


def calibration_windows():
    return draw_windows(tokenise("\n\n".join(TEXT), byte_tokenizer()), SAMPLES, SEQ_LEN, seed=0)


def heard(model, paths, windows):
    """Inputs of layers on a text, and the residual stream where they add to it; float64 tokens."""
    name, blocks = find_blocks(model)
    read, told, handles = {}, {}, []

    def observe(path):
        def hook(module, args, output):
            output = output[0] if isinstance(output, tuple) else output
            read[path], told[path] = args[0].flatten(0, -2).double(), output.flatten(0, -2).double()

        return hook

    modules = {path: model.get_submodule(path) for path in paths} | {f"{name}.{i}": b for i, b in enumerate(blocks)}
    handles = [module.register_forward_hook(observe(path)) for path, module in modules.items()]
    logits(model, windows)
    for handle in handles:
        handle.remove()
    stream = {}
    for path in paths:
        block = f"{name}.{path.removeprefix(name + '.').split('.')[0]}"
        if path.endswith(ENTRY):
            stream[path] = read[block]
        elif path.endswith(EXIT):
            stream[path] = told[block] - told[path]
    return read, stream


def relative_residual(layer, dense, x, y, anchor, biased, lack=0.0):
    """|| outputs of the layer on y - target || / || target ||, around the means where the bias is free."""
    weight, bias = weight_of(dense).detach().double(), dense.bias
    target = (anchor * x + (1 - anchor) * y) @ weight.T + anchor * lack
    output = y @ product(layer).T
    if biased:
        old = 0 if bias is None else bias.detach().double()
        output = output + layer.bias.detach().double() - old
        return float((output - target).norm() / (target - target.mean(dim=0)).norm())
    return float((output - target).norm() / target.norm())


def check_refined(result, dense, anchor, bias, paths=None, rel=1e-3, residual=True, windows=None):
    """The errors reported are those of raw tokens through the finished model."""
    paths = paths or [target.path for target in find_targets(dense)]
    windows = calibration_windows() if windows is None else windows
    (original, before), (compressed, now) = heard(dense, paths, windows), heard(result.model, paths, windows)
    rows = {row["path"]: row for row in result.report["targets"]}
    for path in paths:
        layer, old = result.model.get_submodule(path), dense.get_submodule(path)
        biased = bias == "all" or (bias == "existing" and old.bias is not None)
        lack = before[path] - now[path] if residual and path in now else 0.0
        expected = relative_residual(layer, old, original[path], compressed[path], anchor, biased, lack)
        assert rows[path]["refined"]["after"] == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize("bias", ["none", "existing", "all"])
@pytest.mark.parametrize("anchor", [0, 0.5, 1])
@pytest.mark.parametrize("refiner", REFINERS.all())
@pytest.mark.parametrize("model", ["gpt2", "qwen2"])
def test_refined_factors(model, refiner, anchor, bias):
    """Errors are those of raw tokens through the finished model, and fall. In qwen2 some layers have a bias.

    In float64: a layer reads what low-rank layers before it give, so without a ridge its problem is all but singular.
    """
    settings = {"anchor": anchor, "bias": bias, "ridge": 0.0, "held_out": 0}
    result = compress(tiny_model(model).double(), refine=refiner, refine_options=settings)
    dense = tiny_model(model).double()
    gains = []
    for row in result.report["targets"]:
        assert 0 < row["refined"]["after"] <= row["refined"]["before"] * (1 + 1e-6)
        gains.append(row["refined"]["after"] / row["refined"]["before"])
    assert min(gains) < 0.999
    check_refined(result, dense, anchor, bias, rel=1e-8)
    for path, layer in low_rank(result.model).items():
        old = dense.get_submodule(path).bias
        assert (layer.bias is not None) == (old is not None or bias == "all")
        if old is not None:
            assert torch.equal(layer.bias, old) == (bias == "none")


def test_refined_on_windows_of_its_own(tmp_path, monkeypatch):
    """More of them than calibrate, none of them a search window; another count needs no new calibration."""
    settings = {"anchor": 1, "ridge": 0.0, "held_out": 2}
    apart = {"corrections": 1, "correction_windows": 2, "search_samples": 2}
    monkeypatch.setattr(HeldOut, "divergence", lambda self, index: 0.0)  # so that nothing is undone
    result = compress(tiny_model("qwen2").double(), refine="regress", refine_options={**settings, "samples_factor": 2})
    tokens = tokenise("\n\n".join(TEXT), byte_tokenizer())
    windows = draw_spread(tokens, 2 * SAMPLES, [16, 0], SAMPLES, SEQ_LEN, seed=0)
    check_refined(result, tiny_model("qwen2").double(), 1, "none", rel=1e-8, windows=windows)
    assert not any("factors are refined on" in note for note in result.report["notes"])
    monkeypatch.undo()
    options = {**apart, "method": "kfac_svd", "run_dir": tmp_path / "run", "refine": "regress"}
    few = compress(refine_options={"samples_factor": 2}, **options)
    monkeypatch.setattr("slimrank.pipeline.decomposing.Collector", None)
    many = compress(refine_options={"samples_factor": 3}, **options)
    assert few.plan == many.plan
    assert [r["refined"] for r in few.report["targets"]] != [r["refined"] for r in many.report["targets"]]


def test_refined_on_no_more_windows_than_the_text_holds(monkeypatch):
    seen, draw = [], slimrank.calibration.draws.draw_spread
    monkeypatch.setattr("slimrank.calibration.draws.draw_spread", lambda *a: seen.append(draw(*a)) or seen[-1])
    options = {"refine": "regress", "refine_options": {"samples_factor": 999, "held_out": 0}}
    held = len(tokenise("\n\n".join(TEXT), byte_tokenizer())) // SEQ_LEN
    note = "the calibration text is short: factors are refined on {} windows, not " + str(999 * SAMPLES)
    assert note.format(held) in compress(**options).report["notes"]
    assert len(seen[-1]) == held
    short = compress(calibration=(TEXT[0][: 6 * SEQ_LEN],), **options)
    assert note.format(6) in short.report["notes"]
    options["refine_options"]["held_out"] = 4  # search windows take all the room
    short = compress(calibration=(TEXT[0][: 6 * SEQ_LEN],), **options)
    assert note.format(SAMPLES) in short.report["notes"]
    assert len(seen[-1]) < SAMPLES


def kl_on(dense, model, windows, dropped):
    """KL(dense || model) of whole passes in float64, in nats a token, over the positions that count."""
    p, q = (logits(m, windows).double()[:, dropped:].log_softmax(-1) for m in (dense, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def blocks_undone(report):
    """As the one note says that there is of them."""
    notes = [note for note in report["notes"] if note.startswith("refining was undone in ")]
    assert len(notes) <= 1
    found = {int(part.split(":")[0]) for note in notes for part in note.split("with): ")[1].split("; ")}
    assert all(note.startswith(f"refining was undone in {len(found)} of 3 blocks,") for note in notes)
    return found


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("model", ["gpt2", "qwen2"])
def test_a_refined_block_is_kept_only_where_it_is_nearer_on_windows_kept_aside(model, bias, tmp_path, monkeypatch):
    """Each decision by whole passes of models that are made by hand; the last one is the finished model's."""
    options = {"refine": "regress", "refine_options": {"bias": bias}, "keep_ratio": 0.4, "search_samples": 3}
    seen, divergence = [], HeldOut.divergence
    monkeypatch.setattr(HeldOut, "divergence", lambda self, index: seen.append(divergence(self, index)) or seen[-1])
    result = compress(tiny_model(model), **options)
    after, before = seen[0::2], seen[1::2]
    undone = {i for i, (a, b) in enumerate(zip(after, before, strict=True)) if a > b}
    assert blocks_undone(result.report) == undone
    for row in result.report["targets"]:
        if row["block"] in undone:
            assert row["refined"]["undone"]
            assert row["refined"]["after"] == row["refined"]["before"]
    (windows,), _ = draw_apart(tokenise("\n\n".join(TEXT), byte_tokenizer()), [3], SAMPLES, SEQ_LEN, 0, None)
    ours = kl_on(tiny_model(model), result.model, windows, SEQ_LEN // 2)
    assert ours == pytest.approx(min(after[-1], before[-1]), rel=1e-3)


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("worse", [True, False])
def test_undone_blocks_are_cut_blocks_also_after_an_interruption(worse, after, tmp_path, monkeypatch):
    """Whatever refining did, bit by bit, biases and their count included."""
    seen = []

    def judged(self, index):
        seen.append(index)
        return float(len(seen) % 2) if worse else 0.0

    monkeypatch.setattr(HeldOut, "divergence", judged)
    options = {"refine": "update", "refine_options": {"bias": "all"}}
    resumed, _ = interrupted_then_resumed(tmp_path, "cut and refine factors", after, **options)
    seen.clear()
    assert_same(resumed, compress(**options))
    assert blocks_undone(resumed.report) == ({0, 1, 2} if worse else set())
    plain = low_rank(compress(plan=resumed.plan, keep_ratio=None).model)
    for path, layer in low_rank(resumed.model).items():
        assert torch.equal(layer.B.weight, plain[path].B.weight) == worse
        assert (layer.bias is None) == worse


def test_a_refined_block_that_gives_no_number_is_undone(monkeypatch):
    seen = []
    monkeypatch.setattr(
        HeldOut, "divergence", lambda self, index: seen.append(index) or (math.nan, 1.0)[1 - len(seen) % 2]
    )
    assert blocks_undone(compress(refine="update").report) == {0, 1, 2}


@pytest.mark.parametrize("refiner", REFINERS.all())
def test_the_residual_stream_may_be_left_as_it_is(refiner):
    settings = {"anchor": 1, "residual": False, "ridge": 0.0, "held_out": 0}
    result = compress(tiny_model("qwen2").double(), refine=refiner, refine_options=settings)
    check_refined(result, tiny_model("qwen2").double(), 1, "none", rel=1e-8, residual=False)
    with pytest.raises(AssertionError):
        check_refined(result, tiny_model("qwen2").double(), 1, "none", rel=1e-8)


@pytest.mark.parametrize("model", ["llama", "gpt2", "qwen2"])
def test_all_layers_of_a_block_refined_at_once(model):
    """Errors are those of the finished model only for layers that read no refined layer of their block."""
    settings = {"anchor": 1, "ridge": 0.0, "held_out": 0}
    dense = tiny_model(model)
    at_once = compress(model, refine="update", refine_options={**settings, "true_sequential": False})
    check_refined(at_once, dense, 1, "none", first_layers(dense))
    with pytest.raises(AssertionError):
        check_refined(at_once, dense, 1, "none")
    in_order = compress(model, refine="update", refine_options=settings)
    first = first_layers(dense)[0]
    assert torch.equal(product(in_order.model.get_submodule(first)), product(at_once.model.get_submodule(first)))


@pytest.mark.parametrize("refiner", REFINERS.all())
@pytest.mark.parametrize("method", METHODS)
def test_every_method_may_be_refined(method, refiner):
    if DECOMPOSERS.get(method).groups and REFINERS.get(refiner).changes_a:
        with pytest.raises(RecipeError, match="shares between layers"):
            compress(method=method, refine=refiner)
        return
    result = compress(method=method, refine=refiner)
    for row in result.report["targets"]:
        assert 0 < row["refined"]["after"] <= row["refined"]["before"] * (1 + 1e-4)
    check_refined(result, tiny_model(), 0.5, "none")
    assert result.report["size"] == result_of(method, "llama").report["size"]


def test_refiners_in_order_of_what_they_may_change():
    """B alone, one round of both, and the optimum: the first layer of the first block has the same problem in each."""
    options = {"method": "svd", "refine_options": {"ridge": 0.0}}
    after = {name: compress(refine=name, **options).report["targets"][0]["refined"]["after"] for name in REFINERS.all()}
    assert after["regress"] < after["ada_comp"] < after["update"]
    assert after["regress"] == pytest.approx(result_of("svd_llm", "llama").report["targets"][0]["relative_error"])


def test_before_is_the_error_of_the_cut():
    rows = compress(refine="update", refine_options={"anchor": 0}).report["targets"]
    assert rows[0]["refined"]["before"] == pytest.approx(rows[0]["relative_error"], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("refiner", REFINERS.all())
def test_refined_factors_in_16_bits(refiner, dtype):
    """B makes up for part of the rounding of A, and is itself rounded."""
    result = compress(tiny_model().to(dtype), refine=refiner, refine_options={"bias": "all"})
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert all(r["refined"]["after"] <= r["refined"]["before"] * 1.01 for r in result.report["targets"])
    assert bool(torch.isfinite(logits(result.model).float()).all())


@pytest.mark.parametrize("stack, count", [(1, SAMPLES * SEQ_LEN), (2, 3 * SEQ_LEN)])
@pytest.mark.parametrize("anchor", [0, 1])
def test_refinement_sees_exactly_the_calibration_tokens(anchor, stack, count, monkeypatch):
    """5 windows in batches of 2, 2 and 1; stacks do not go beyond a batch."""
    counts, problem = [], StreamSums.problem

    def spy(self, *arguments):
        counts.append((self.inputs.count, self.wanted.count))
        return problem(self, *arguments)

    monkeypatch.setattr(StreamSums, "problem", spy)
    compress(refine="ada_comp", refine_options={"anchor": anchor, "stack_of_batch": stack})
    assert counts == [(count, count)] * 21


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_the_ridge_is_chosen_by_halves_of_the_calibration_tokens(batch, monkeypatch):
    """Three windows and two, whatever the batches. The chosen one shows in the report."""
    seen = []

    def chosen(halves, weight):
        seen.append((halves, weight))
        return float(len(seen))

    monkeypatch.setattr("slimrank.pipeline.refining.cross_validated", chosen)
    settings = {"anchor": 1, "ridge": "auto", "held_out": 0}
    result = compress(refine="regress", refine_options=settings, batch_size=batch)
    assert sorted(row["refined"]["ridge"] for row in result.report["targets"]) == list(range(1, 22))
    dense, first = tiny_model(), "model.layers.0.self_attn.q_proj"
    inputs = heard(dense, [first], calibration_windows())[0][first].unflatten(0, (SAMPLES, SEQ_LEN))
    halves, weight = seen[0]
    assert torch.equal(weight, weight_of(dense.get_submodule(first)))
    for half, part in zip(halves, inputs.split(3), strict=True):
        x = part.flatten(0, 1)
        torch.testing.assert_close(half.gram, x.t() @ x, rtol=1e-5, atol=1e-5)


def test_a_stack_that_half_of_the_windows_cannot_make():
    settings = {"ridge": "auto", "stack_of_batch": 4}
    with pytest.raises(RecipeError, match="a batch has 2"):
        compress(samples=4, batch_size=4, refine="ada_comp", refine_options=settings)
    compress(samples=8, batch_size=4, refine="ada_comp", refine_options={**settings, "held_out": 0})


def test_a_large_ridge_by_halves_leaves_the_target_to_the_original_weight(monkeypatch):
    """Then the anchored target is that of `self`, whatever the compressed model lacks."""
    monkeypatch.setattr("slimrank.pipeline.refining.cross_validated", lambda halves, weight: 1e12)
    settings = {"held_out": 0, "residual": False}
    ours = compress(refine="regress", refine_options={**settings, "anchor": 1, "ridge": "auto"})
    other = compress(refine="regress", refine_options={**settings, "anchor": 0, "ridge": 1e-3})
    for path, layer in low_rank(other.model).items():
        torch.testing.assert_close(product(ours.model.get_submodule(path)), product(layer), rtol=1e-3, atol=1e-3)


def test_a_ridge_chosen_by_halves_with_one_window():
    options = {"refine": "update", "refine_options": {"ridge": "auto"}}
    with pytest.raises(RecipeError, match="there is one window"):
        compress(samples=1, **options)
    assert all(row["refined"]["ridge"] > 0 for row in compress(samples=2, **options).report["targets"])
    options["refine_options"]["samples_factor"] = 2
    assert all(row["refined"]["ridge"] > 0 for row in compress(samples=1, **options).report["targets"])


def test_fewer_windows_to_judge_on_than_were_asked_for_are_told():
    options = {"refine": "update", "refine_options": {"held_out": 3}}
    few, enough = (" ".join(compress(search_samples=n, **options).report["notes"]) for n in (2, 3))
    assert "judged on 2 windows, all that search_samples allows, not 3" in few
    assert "are judged on" not in enough


REFINEMENTS = [
    {"method": "svd", "refine": "regress", "refine_options": {"anchor": 1, "samples_factor": 2}},
    {"method": "kfac_svd", "refine": "regress", "refine_options": {"anchor": 1, "ridge": "auto"}},
    {"method": "svd_llm", "refine": "regress", "refine_options": {"anchor": 0.5, "bias": "all"}},
    {"method": "svd_llm", "refine": "ada_comp", "refine_options": {"anchor": 0}},
    {"method": "kfac_svd", "refine": "update", "refine_options": {"anchor": 1, "bias": "existing"}},
    {"method": "basis_sharing", "refine": "update", "refine_options": {"bias": "all"}},
    {"method": "basis_sharing", "method_options": SHARED["both"], "refine": "update", "refine_options": {"anchor": 0}},
    {"method": "dobi_svd", "refine": "update"},
]


@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("options", REFINEMENTS, ids=str)
def test_resuming_a_refinement_gives_the_same_bits(options, after, tmp_path):
    resumed, notes = interrupted_then_resumed(tmp_path, "cut and refine factors", after, model="qwen2", **options)
    assert_same(resumed, compress("qwen2", **options))
    assert notes[-1] == f"resuming at block {after} of 3"


def test_resuming_a_refinement_runs_finished_blocks_no_more(tmp_path, monkeypatch):
    """Block 0 is neither calibrated nor refined again: nothing but block 2 is run."""
    with pytest.raises(KeyboardInterrupt):
        compress(run_dir=tmp_path, refine="update", progress=interrupting("cut and refine factors", 2))
    ran, run = set(), slimrank.models.blocks.BlockRunner.run

    def spy(self, index, b, hidden):
        ran.add(index)
        return run(self, index, b, hidden)

    monkeypatch.setattr("slimrank.models.blocks.BlockRunner.run", spy)
    compress(run_dir=tmp_path, refine="update")
    assert ran == {2}


def with_idle_layer():
    """The second block holds a linear layer that is never called."""
    model = tiny_model()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.model.layers[1].mlp.idle = nn.Linear(32, 32)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_no_token_reaches(method):
    result = compress(with_idle_layer(), method=method, refine="update")
    notes = [n for n in result.report["notes"] if n.startswith("model.layers.1.mlp.idle")]
    assert any("no calibration token reached this layer: not refined" in n for n in notes)
    assert method == "svd" or any("plain SVD instead" in n for n in notes)
    assert isinstance(result.model.model.layers[1].mlp.idle, LowRankLinear)


def test_resuming_a_refinement_past_a_layer_that_no_token_reached(tmp_path):
    options = {"refine": "update"}
    resumed, _ = interrupted_then_resumed(tmp_path, "cut and refine factors", 2, model=with_idle_layer, **options)
    assert_same(resumed, compress(with_idle_layer(), **options))


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_whose_output_nothing_uses(method):
    """Tokens reach it, gradients do not."""
    model = with_idle_layer()
    model.model.layers[1].mlp.register_forward_hook(lambda m, a, out: (m.idle(a[0]), out)[1])
    result = compress(model, method=method)
    assert bool(torch.isfinite(product(model.model.layers[1].mlp.idle)).all())
    if method in BACKWARD:
        assert any(note.startswith("model.layers.1.mlp.idle") for note in result.report["notes"])


def tied_between_layers():
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model


def test_the_original_stream_is_the_original_model_where_weights_are_tied():
    """up_proj of block 1 is replaced along with that of block 0; what block 2 reads in the original must not be."""
    result = compress(
        tied_between_layers(),
        refine="regress",
        refine_options={"ridge": 0.0, "anchor": 1.0, "held_out": 0},
        keep_ratio=0.4,
    )
    check_refined(result, tied_between_layers(), 1.0, "none")


@pytest.mark.parametrize("after", [1, 2])
def test_resuming_a_refinement_of_tied_weights(after, tmp_path):
    options = {"refine": "regress", "refine_options": {"anchor": 0.5}}
    resumed, _ = interrupted_then_resumed(
        tmp_path, "cut and refine factors", after, model=tied_between_layers, **options
    )
    assert_same(resumed, compress(tied_between_layers(), **options))


def test_refined_layers_that_are_tied_stay_tied():
    layers = compress(tied_between_layers(), refine="regress", refine_options={"bias": "all"}).model.model.layers
    first, second = layers[0].mlp.up_proj, layers[1].mlp.up_proj
    assert first.A.weight is second.A.weight
    assert first.B.weight is second.B.weight
    assert first.bias is None
    assert second.bias is None


# new biases ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [{"keep_ratio": 0.58}, {"keep_total": 0.8}, {"max_bytes": 95_000}])
@pytest.mark.parametrize("model", ["llama", "gpt2", "qwen2"])
def test_new_biases_count(model, budget, tmp_path):
    if "max_bytes" in budget and model != "llama":
        budget = {"max_bytes": 130_000}
    folder = save_tiny(tmp_path / "model", model)
    options = {
        **PLAIN,
        "keep_ratio": None,
        **budget,
        "refine": "update",
        "refine_options": {"bias": "all", "held_out": 0},
    }
    result = slimrank.compress(
        folder, out=tmp_path / "out", calibration=TEXT, evaluation=None, samples=SAMPLES, seq_len=SEQ_LEN, **options
    )
    dense, size = tiny_model(model), result.report["size"]
    new = sum(layer.bias.numel() for path, layer in low_rank(result.model).items() if not _biased(dense, path))
    assert (new > 0) == (model != "gpt2")
    assert size["linears_after"] == result.plan.parameters + new
    assert size["parameters_after"] == sum(p.numel() for p in result.model.parameters())
    assert size["keep_ratio"] == size["linears_after"] / size["linears_before"]
    written = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    name, limit = next(iter(budget.items()))
    assert {"max_bytes": written, **size}[name] <= limit
    assert {"max_bytes": written, **size}[name] > 0.9 * limit
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(result.model))
    assert dict(loaded.named_parameters()).keys() == dict(result.model.named_parameters()).keys()


def _biased(model, path):
    return model.get_submodule(path).bias is not None


@pytest.mark.parametrize(
    "options",
    [
        {"refine": "update", "refine_options": {"bias": "all", "held_out": 0}},
        {"method": "basis_sharing"},
        {"method": "basis_sharing", "method_options": SHARED["both"], "refine": "update"},
        {"method": "kfac_svd"},
    ],
    ids=str,
)
def test_preview_agrees_with_what_is_done(options, tmp_path):
    folder = save_tiny(tmp_path / "model")
    seen, done = slimrank.preview(folder, keep_ratio=KEEP, **{**PLAIN, **options}), compress(**options)
    assert seen["plan"] == done.plan
    assert seen["size"]["parameters_after"] == sum(p.numel() for p in done.model.parameters())
    assert seen["size"]["keep_ratio"] == done.report["size"]["keep_ratio"]
    assert set(seen["seconds"]) >= set(done.report["seconds"])


# shared factors ------------------------------------------------------------------------------------------------


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
        assert pair_cost(m, n, rank) <= keep * m * n < pair_cost(m, n, rank + 1)
        total += pair_cost(m, n, rank)
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


# what cannot be met --------------------------------------------------------------------------------------------


def detached():
    """A model that computes its embeddings itself and cuts the graph there."""
    model = tiny_model()
    inner, embed = model.model.forward, model.model.embed_tokens

    def forward(input_ids=None, inputs_embeds=None, **rest):
        return inner(inputs_embeds=embed(input_ids).detach(), **rest)

    model.model.forward = forward
    return model


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("method", BACKWARD)
def test_a_model_that_passes_no_gradients_is_refused_before_calibration(method, resident, monkeypatch):
    forbid_passes(monkeypatch)
    with pytest.raises(ModelError, match="no gradients pass through LlamaForCausalLM") as refused:
        compress(detached(), method=method, resident=resident)
    assert "svd_llm" in refused.value.hint


def test_such_a_model_may_be_compressed_without_gradients():
    assert_same(compress(detached(), method="svd_llm"), result_of("svd_llm", "llama"))


@pytest.mark.parametrize("method", [m for m in METHODS if m != "svd"])
def test_missing_calibration_text(method, monkeypatch):
    forbid_passes(monkeypatch)
    with pytest.raises(DataError, match="does not exist"):
        compress(method=method, calibration="no-such-file.txt")


def test_svd_needs_no_text_but_its_refinement_does():
    compress(method="svd", calibration="no-such-file.txt")
    with pytest.raises(DataError, match="does not exist"):
        compress(method="svd", refine="update", calibration="no-such-file.txt")


def with_dead_inputs():
    """The second block reads zeros, and nothing passes gradients to its queries."""
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.zero_()
    return model


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_read_zeros(method):
    result, plain = compress(with_dead_inputs(), method=method), result_of("svd", "llama")
    path = "model.layers.1.self_attn.q_proj"
    notes = [note for note in result.report["notes"] if note.startswith(path)]
    assert all(math.isfinite(row["relative_error"]) for row in result.report["targets"])
    assert bool(torch.isfinite(logits(result.model)).all())
    if method in ("svd", "basis_sharing"):
        return
    ours, expected = (product(r.model.get_submodule(path)) for r in (result, plain))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    if method != "dobi_svd":
        assert any("form is zero" in note and "plain SVD instead" in note for note in notes)


@pytest.mark.parametrize("method", METHODS)
def test_fewer_tokens_than_channels(method):
    result = compress(method=method, samples=1, seq_len=8, batch_size=1)
    assert all(0 <= row["relative_error"] < 1 for row in result.report["targets"])
    assert bool(torch.isfinite(logits(result.model)).all())


# options -------------------------------------------------------------------------------------------------------

BAD_OPTIONS = [
    ("asvd", {"alpha": 2}, "less than or equal to 1, got 2", "alpha: number >= 0, <= 1; 0.5 by default"),
    ("asvd", {"alpah": 0.5}, "has no option 'alpah'", "did you mean 'alpha'"),
    ("asvd", {"scale": "median"}, "'mean' or 'max', got 'median'", "scale: mean, max; mean by default"),
    ("svd_llm", {"alpha": 0.5}, "has no option 'alpha'", "it takes none"),
    ("coala", {"alpha": 0.5}, "has no option 'alpha'", "mu"),
    ("coala", {"mu": -1}, "greater than or equal to 0", "mu: number >= 0 or adaptive"),
    ("kfac_svd", {"row_shrink": 1.5}, "less than or equal to 1", "number >= 0, <= 1; 0.3 by default"),
    ("kfac_svd", {"trim": 0.5}, "less than 0.5", "trim: number >= 0, < 0.5"),
    ("kfac_svd", {"clip": [2, 0.5]}, "0 <= low <= 1 <= high", "clip: list or null"),
    ("kfac_svd", {"accumulate": 2}, "has no option 'accumulate'", "known"),
    ("gfwsvd", {"accumulate": 0}, "greater than or equal to 1", "accumulate: integer >= 1; 4 by default"),
    ("drone", {"min_norm": "perhaps"}, "valid boolean", "min_norm: boolean"),
    ("basis_sharing", {"layers": 0}, "greater than or equal to 1", "layers: integer >= 1; 2 by default"),
    ("basis_sharing", {"layers": 1}, "finds no layers that could share", "layers=2"),
]


@pytest.mark.parametrize("method, options, message, hint", BAD_OPTIONS)
def test_bad_options_of_methods(method, options, message, hint, monkeypatch):
    forbid_passes(monkeypatch)
    with pytest.raises(RecipeError) as refused:
        compress(method=method, method_options=options)
    assert message in refused.value.message
    assert hint in refused.value.hint


@pytest.mark.parametrize(
    "options, message",
    [
        ({"refine": "updat"}, "did you mean 'update'"),
        ({"refine": "update", "refine_options": {"anchor": 1.5}}, "less than or equal to 1"),
        ({"refine": "update", "refine_options": {"bias": "some"}}, "'none', 'existing' or 'all'"),
        ({"refine": "update", "refine_options": {"ancor": 1}}, "did you mean 'anchor'"),
        ({"refine": "update", "refine_options": {"iterations": 2}}, "has no option 'iterations'"),
        ({"refine": "update", "refine_options": {"stack_of_batch": 2}}, "has no option 'stack_of_batch'"),
        ({"refine": "ada_comp", "refine_options": {"iterations": 0}}, "greater than or equal to 1"),
        ({"refine": "ada_comp", "refine_options": {"stack_of_batch": 3}}, "a batch has 2"),
        ({"refine_options": {"anchor": 1}}, "but no refiner"),
        ({"method": "basis_sharing", "refine": "regress"}, "shares between layers"),
        ({"method": "basis_sharing", "refine": "ada_comp"}, "--refine update leaves them alone"),
    ],
)
def test_bad_options_of_refiners(options, message, monkeypatch, tmp_path):
    forbid_passes(monkeypatch)
    with pytest.raises(RecipeError, match=message):
        compress(**options)


@pytest.mark.parametrize(
    "method, options",
    [
        ("asvd", {"alpha": 0}), ("asvd", {"scale": "max"}), ("drone", {"min_norm": True}), ("coala", {"mu": 0.5}),
        ("coala", {"mu0": 30}), ("kfac_svd", {"row_shrink": 0.9}), ("kfac_svd", {"column_shrink": 0.9}),
        ("kfac_svd", {"clip": [0.9, 1.1]}), ("kfac_svd", {"trim": 0.4}), ("gfwsvd", {"iterations": 1}),
        ("gfwsvd", {"shrink": 0.9}), ("gfwsvd", {"accumulate": 1}), ("basis_sharing", {"share": ["up_proj"]}),
    ],
    ids=str,
)  # fmt: skip
def test_every_option_changes_something(method, options):
    keys = {"samples": 1, "seq_len": 16} if method == "drone" else {}
    changed, default = compress(method=method, method_options=options, **keys), compress(method=method, **keys)
    differing = [
        path for path, layer in low_rank(changed.model).items()
        if layer.rank != (other := default.model.get_submodule(path)).rank
        or not torch.allclose(product(layer), product(other), atol=1e-6)
    ]  # fmt: skip
    assert differing
    described = json.loads(json.dumps(changed.report["provenance"]["method"]))
    used = {**described, **described["options"]}
    assert used | options == used


def test_asvd_at_power_zero_is_the_plain_svd():
    ours, plain = compress(method="asvd", method_options={"alpha": 0}), result_of("svd", "llama")
    for path, layer in low_rank(ours.model).items():
        torch.testing.assert_close(product(layer), product(plain.model.get_submodule(path)), rtol=1e-4, atol=1e-6)


def test_kfac_without_a_row_side_is_svd_llm():
    settings = {"row_shrink": 1.0, "column_shrink": 0.0}
    ours, plain = compress(method="kfac_svd", method_options=settings), result_of("svd_llm", "llama")
    for path, layer in low_rank(ours.model).items():
        one, other = product(layer), product(plain.model.get_submodule(path))
        assert float((one - other).norm() / other.norm()) < 1e-3


# ranks ---------------------------------------------------------------------------------------------------------


def test_ranks_are_integers_and_survive_everything(tmp_path):
    """A rank that goes through a float ratio comes back one smaller for about 5 % of ranks."""
    m, n = 4096, 1024  # 819 is the largest rank at which the pair is smaller
    ranks = {f"layer{r}": r for r in range(1, 901)}
    plan = RankPlan.build(ranks, dict.fromkeys(ranks, (m, n)), "by hand", 900 * m * n * 2)
    plan.save(tmp_path / "plan.json")
    loaded = RankPlan.load(tmp_path / "plan.json")
    assert loaded.factored() == ranks
    assert all(type(rank) is int for rank in loaded.factored().values())
    assert loaded.parameters == sum(r * (m + n) for r in ranks.values())
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()


def test_a_budget_of_exactly_one_rank_gives_that_rank():
    m, n = 4096, 1024
    for rank in range(1, 901):
        for budget, cut in ((rank * (m + n), rank), (rank * (m + n) + m + n - 1, rank)):
            expected = cut if budget < m * n else "dense"
            given = Problem((Item("layer", (m, n)),), budget)
            assert ALLOCATORS.get("uniform").configured({}).allocate(given).ranks == {"layer": expected}


def test_ranks_of_a_plan_are_those_of_the_layers():
    plan = result_of("svd", "gpt2").plan
    targets = {path: t.model_copy(update={"rank": 1 + i}) for i, (path, t) in enumerate(plan.targets.items())}
    edited = plan.model_copy(update={"targets": targets, "budget": None})
    result = compress("gpt2", method="svd", plan=edited, keep_ratio=None)
    assert {path: layer.rank for path, layer in low_rank(result.model).items()} == edited.factored()


# the command line ----------------------------------------------------------------------------------------------


def run(capsys, *arguments):
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--method", "asvd", "--option", "alpha=2"], "less than or equal to 1, got 2"),
        (["--method", "asvd", "--option", "alpah=1"], "did you mean 'alpha'"),
        (["--method", "svd_llm", "--option", "alpha=1"], "has no option 'alpha'"),
        (["--method", "asvd", "--option", "alpha"], "is not NAME=VALUE"),
        (["--method", "asvd", "--option", "alpha=["], "cannot be read"),
        (["--refine", "update", "--refine-option", "anchor=2"], "less than or equal to 1, got 2"),
        (["--method", "svd_llm", "--refine-option", "anchor=1"], "but no refiner"),
        (["--method", "basis_sharing", "--refine", "regress"], "shares between layers"),
    ],
)
def test_errors_on_the_command_line(capsys, tiny_folder, tmp_path, arguments, message):
    common = ["compress", tiny_folder, "--keep", 0.6, "--no-eval", "--out", tmp_path / "out"]
    code, shown, error = run(capsys, *common, *arguments)
    assert (code, shown) == (1, "")
    assert message in error
    assert "try:" in error
    code, shown, _ = run(capsys, *common, *arguments, "--json")
    record = json.loads(shown)["error"]
    assert (code, record["type"]) == (1, "RecipeError")
    assert message in record["message"] + record["hint"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, method, expected",
    [
        (["--method", "asvd", "--option", "alpha=0.25", "--option", "scale=max"], {"alpha": 0.25, "scale": "max"}, {}),
        (["--method", "kfac_svd", "--option", "clip=[0.5,2]", "--option", "trim=0"], {}, {"clip": [0.5, 2], "trim": 0}),
        (["--method", "kfac_svd", "--option", "clip=null"], {}, {"clip": None}),
        (["--method", "basis_sharing", "--option", "share=[up_proj,q_proj]"], {"share": ["up_proj", "q_proj"]}, {}),
        (["--method", "coala", "--option", "mu=adaptive"], {"mu": "adaptive"}, {}),
        (["--method", "drone", "--option", "min_norm=true"], {"min_norm": True}, {}),
    ],
)
def test_options_on_the_command_line(capsys, tiny_folder, text_file, tmp_path, arguments, method, expected):
    code, shown, error = run(
        capsys, "compress", tiny_folder, "--keep", 0.6, "--no-eval", "--out", tmp_path / "out", "--calibration",
        text_file, "--samples", 3, "--seq-len", 16, "--refine", "update", "--refine-option", "anchor=0.5",
        "--json", *arguments,
    )  # fmt: skip
    assert code == 0, error
    record = json.loads(shown)
    described = record["provenance"]["method"]
    assert described["id"] == arguments[1]
    assert described["options"] | method == described["options"]
    assert described | expected == described
    assert record["provenance"]["recipe"]["refine_options"] == {"anchor": 0.5}
    assert all(row["refined"]["after"] > 0 for row in record["targets"])
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == record


def test_the_list_of_methods(capsys):
    code, shown, _ = run(capsys, "methods")
    assert code == 0
    assert all(name in shown for name in [*METHODS, *REFINERS.all(), *ALLOCATORS.all()])
    assert "backward pass" in shown
    assert "no pass over text" in shown
    code, shown, _ = run(capsys, "methods", "--json")
    listed = json.loads(shown)
    assert [m["id"] for m in listed["decompose"]] == METHODS
    assert [r["id"] for r in listed["refine"]] == list(REFINERS.all())
    assert {m["id"] for m in listed["decompose"] if m["pass"] == "backward"} == {"fwsvd", "gfwsvd", "kfac_svd"}
    assert {m["id"] for m in listed["decompose"] if m["pass"] == "none"} == {"svd"}


@pytest.mark.parametrize("id", sorted({*METHODS, *REFINERS.all(), *ALLOCATORS.all()}))
def test_one_method(capsys, id):
    code, shown, _ = run(capsys, "methods", id)
    found = json.loads(run(capsys, "methods", id, "--json")[1])
    assert code == 0
    for record in found if isinstance(found, list) else [found]:
        assert record["id"] == id
        assert record["paper"] in shown.replace("\n", " ")
        for name, about in record["options"].items():
            assert name in shown
            assert about["description"]
            assert about["range"]
        if not record["options"]:
            assert "It has no options." in shown


def test_a_method_and_an_allocation_of_one_name(capsys):
    """`asvd` is both."""
    assert [entry["kind"] for entry in json.loads(run(capsys, "methods", "asvd", "--json")[1])] == [
        "decompose",
        "allocate",
    ]
    _, shown, _ = run(capsys, "methods", "asvd")
    assert "--method asvd" in shown
    assert "--allocation asvd" in shown


def test_ranges_and_defaults_of_a_method(capsys):
    options = json.loads(run(capsys, "methods", "kfac_svd", "--json")[1])["options"]
    assert set(options) == {"row_shrink", "column_shrink", "trim", "clip"}
    assert options["row_shrink"]["default"] == 0.3
    assert options["row_shrink"]["range"] == "number >= 0, <= 1"
    assert options["trim"]["range"] == "number >= 0, < 0.5"
    assert options["clip"]["default"] == [0.1, 10.0]
    _, shown, _ = run(capsys, "methods", "kfac_svd")
    assert ">= 0, <= 1" in shown
    code, _, error = run(capsys, "methods", "kfac")
    assert code == 1
    assert "did you mean 'kfac_svd'" in error


def test_a_recipe_file_may_name_method_and_options(tmp_path):
    (tmp_path / "r.yaml").write_text("keep_ratio: 0.6\nmethod: asvd\nmethod_options:\n  alpha: 0.25\nrefine: update\n")
    read = Recipe.make(Recipe.read(tmp_path / "r.yaml"))
    assert (read.method, read.method_options, read.refine) == ("asvd", {"alpha": 0.25}, "update")
    result = compress(method=read.method, method_options=read.method_options)
    assert result.report["provenance"]["method"]["options"]["alpha"] == 0.25
