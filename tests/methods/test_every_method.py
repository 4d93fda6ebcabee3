"""Every method through `slimrank.compress` on tiny models: results, new biases, what cannot be met."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import slimrank
from helpers import save_tiny, tiny_model
from method_runs import (
    BACKWARD,
    KEEP,
    METHODS,
    PLAIN,
    SAMPLES,
    SEQ_LEN,
    SHARED,
    TEXT,
    assert_same,
    compress,
    forbid_passes,
    logits,
    low_rank,
    product,
    result_of,
)
from slimrank.errors import DataError, ModelError
from slimrank.methods.decomposer import DECOMPOSERS, Configured
from slimrank.models.targets import find_targets
from slimrank.progress import Progress

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
