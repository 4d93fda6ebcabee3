"""Refiners through `slimrank.compress` on tiny models."""

import math

import pytest
import torch
from torch import nn

import slimrank
from helpers import byte_tokenizer, tiny_model
from method_runs import (
    BACKWARD,
    METHODS,
    SAMPLES,
    SEQ_LEN,
    TEXT,
    assert_same,
    calibration_windows,
    compress,
    heard,
    interrupted_then_resumed,
    logits,
    low_rank,
    product,
    result_of,
    tied_between_layers,
)
from slimrank.errors import RecipeError
from slimrank.layers import LowRankLinear
from slimrank.layers.dense import weight_of
from slimrank.methods.decomposer import DECOMPOSERS
from slimrank.methods.refiner import REFINERS
from slimrank.models.targets import find_targets
from slimrank.pipeline.stages.held_out_check import HeldOutCheck
from slimrank.statistics.paired_inputs import StreamSums
from slimrank.text.tokens import tokenise
from slimrank.text.windows import draw_apart, draw_spread


def first_layers(model):
    """The first layer of every block: what it reads depends on the blocks before it alone."""
    found = {}
    for target in find_targets(model):
        found.setdefault(target.block, target.path)
    return list(found.values())


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
    monkeypatch.setattr(HeldOutCheck, "divergence", lambda self, index: 0.0)  # so that nothing is undone
    result = compress(tiny_model("qwen2").double(), refine="regress", refine_options={**settings, "samples_factor": 2})
    tokens = tokenise("\n\n".join(TEXT), byte_tokenizer())
    windows = draw_spread(tokens, 2 * SAMPLES, ([16, 0], SAMPLES), SEQ_LEN, seed=0)
    check_refined(result, tiny_model("qwen2").double(), 1, "none", rel=1e-8, windows=windows)
    assert not any("factors are refined on" in note for note in result.report["notes"])
    monkeypatch.undo()
    options = {**apart, "method": "kfac_svd", "run_dir": tmp_path / "run", "refine": "regress"}
    few = compress(refine_options={"samples_factor": 2}, **options)
    monkeypatch.setattr("slimrank.pipeline.stages.calibration_pass.Collector", None)
    many = compress(refine_options={"samples_factor": 3}, **options)
    assert few.plan == many.plan
    assert [r["refined"] for r in few.report["targets"]] != [r["refined"] for r in many.report["targets"]]


def test_refined_on_no_more_windows_than_the_text_holds(monkeypatch):
    seen, draw = [], slimrank.text.window_draws.draw_spread
    monkeypatch.setattr("slimrank.text.window_draws.draw_spread", lambda *a: seen.append(draw(*a)) or seen[-1])
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
    assert all(note.startswith(f"refining was undone in {len(found)} of 3 blocks:") for note in notes)
    return found


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("model", ["gpt2", "qwen2"])
def test_a_refined_block_is_kept_only_where_it_is_nearer_on_windows_kept_aside(model, bias, tmp_path, monkeypatch):
    """Each decision by whole passes of models that are made by hand; the last one is the finished model's."""
    options = {"refine": "regress", "refine_options": {"bias": bias}, "keep_ratio": 0.4, "search_samples": 3}
    seen, divergence = [], HeldOutCheck.divergence
    monkeypatch.setattr(
        HeldOutCheck, "divergence", lambda self, index: seen.append(divergence(self, index)) or seen[-1]
    )
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

    monkeypatch.setattr(HeldOutCheck, "divergence", judged)
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
        HeldOutCheck, "divergence", lambda self, index: seen.append(index) or (math.nan, 1.0)[1 - len(seen) % 2]
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

    def chosen(halves, weight, unit):
        seen.append((halves, weight))
        return float(len(seen))

    monkeypatch.setattr("slimrank.pipeline.stages.refinement.cross_validated", chosen)
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
    monkeypatch.setattr("slimrank.pipeline.stages.refinement.cross_validated", lambda halves, weight, unit: 1e12)
    settings = {"held_out": 0, "residual": False}
    ours = compress(refine="regress", refine_options={**settings, "anchor": 1, "ridge": "auto"})
    other = compress(refine="regress", refine_options={**settings, "anchor": 0, "ridge": 1e-3})
    for path, layer in low_rank(other.model).items():
        torch.testing.assert_close(product(ours.model.get_submodule(path)), product(layer), rtol=1e-3, atol=1e-3)


def test_a_ridge_chosen_by_halves_with_one_window():
    options = {"refine": "update", "refine_options": {"ridge": "auto"}}
    with pytest.raises(RecipeError, match="there is only one window"):
        compress(samples=1, **options)
    assert all(row["refined"]["ridge"] > 0 for row in compress(samples=2, **options).report["targets"])
    options["refine_options"]["samples_factor"] = 2
    assert all(row["refined"]["ridge"] > 0 for row in compress(samples=1, **options).report["targets"])


def test_fewer_windows_to_judge_on_than_were_asked_for_are_told():
    options = {"refine": "update", "refine_options": {"held_out": 3}}
    few, enough = (" ".join(compress(search_samples=n, **options).report["notes"]) for n in (2, 3))
    assert "judged on 2 windows, all that search_samples allows, not 3" in few
    assert "are judged on" not in enough


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
