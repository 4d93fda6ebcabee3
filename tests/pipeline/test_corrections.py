"""Rounds that move all factors against the gradient of the divergence from the original."""

import copy
import itertools

import pytest
import torch
from torch.nn.functional import log_softmax

import slimrank
from helpers import CONFIGS, byte_tokenizer, save_tiny, text, tiny_model
from slimrank.errors import RecipeError
from slimrank.layers.base import compressed_layers
from slimrank.models.blocks import Batch, BlockRunner
from slimrank.models.divergence import divergence_gradients
from slimrank.models.gradients import step_back
from slimrank.models.structure import find_blocks
from slimrank.pipeline.prepare import Choices
from slimrank.pipeline.stages.correction import Correction
from slimrank.statistics.catalogue import GatherOptions
from slimrank.statistics.collector import Collector
from slimrank.text.texts import read_texts

SMALL = {"method": "svd_llm", "samples": 4, "search_samples": 4, "seq_len": 24, "batch_size": 2, "evaluation": None}
FORMS = [{}, {"form": "pivot"}]


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text(6000))
    return str(path)


def compress(model, calibration, **options):
    chosen = {"keep_ratio": 0.6, "corrections": 2, "correction_windows": 2, **SMALL, **options}
    return slimrank.compress(model, byte_tokenizer(), calibration=calibration, **chosen)


def kl(original, changed, ids):
    p, q = (log_softmax(m(input_ids=ids, use_cache=False).logits, -1) for m in (original, changed))
    return (p.exp() * (p - q)).sum()


@pytest.mark.parametrize("name", CONFIGS)
def test_slopes_are_those_of_autograd(name):
    """Gathered block by block against one backward pass of the whole model."""
    original, changed = tiny_model(name, seed=1), tiny_model(name, seed=2)
    ids = torch.arange(40).view(2, 20) % 100
    path, _ = find_blocks(original)
    changed.load_state_dict({n: p for n, p in original.state_dict().items() if not n.startswith(path)}, strict=False)
    runner = BlockRunner(changed, torch.device("cpu"), upcast=False, resident=False)
    linears = {n: m for n, m in changed.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith(runner.path)}
    with runner.session():
        finals = []
        for model in (original, changed):
            mine = BlockRunner(model, torch.device("cpu"), upcast=False, resident=False)
            mine.embed([Batch(ids)])
            finals.append(mine.finals(mine.states, 0))
        runner.embed([Batch(ids)])
        inputs = [
            [h]
            for h in itertools.accumulate(
                range(len(runner)), lambda h, i: runner.run(i, 0, h), initial=runner.states[0]
            )
        ]
        gradients, total = divergence_gradients(runner, finals[1], finals[0])
        collector = Collector(linears, GatherOptions(needs=frozenset({"gram", "slope"})), torch.device("cpu"))
        with collector:
            for index in reversed(range(len(runner))):
                collector.begin(None, (2, 20))
                step_back(runner, index, inputs[index], gradients)
    loss = kl(original, changed, ids)
    assert total == pytest.approx(float(loss.detach()), rel=1e-5)
    loss.backward()
    for path, layer in linears.items():
        slope = collector.statistics[path].slope
        torch.testing.assert_close(
            slope, layer.weight.grad, rtol=1e-3, atol=1e-4 * float(slope.abs().max()), check_dtype=False
        )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("form", FORMS)
def test_windows_kept_aside_get_nearer_to_the_original(name, form, calibration):
    rounds = compress(tiny_model(name), calibration, **form).report["corrections"]
    assert len(rounds) == 2
    assert any(r["kept"] for r in rounds)
    for r in rounds:
        assert r["after"] < r["before"] if r["kept"] else r["after"] == r["before"]
        assert (r["length"] > 0) == r["kept"]
    assert rounds[0]["after"] == rounds[1]["before"]


def test_the_report_is_of_the_model_that_comes_out(calibration):
    """The divergence after the last round, measured again by whole passes."""
    original = tiny_model()
    result = compress(copy.deepcopy(original), calibration)
    recipe = result_recipe(result)
    raw = read_texts(recipe, Choices.of(recipe).requests)
    windows = raw.tokenised(recipe, original, byte_tokenizer(), slimrank.progress.Progress())["search"]
    dropped = 12
    with torch.no_grad():
        p, q = (log_softmax(m(input_ids=windows).logits[:, dropped:], -1) for m in (original, result.model))
    found = float((p.exp() * (p - q)).sum() / q[..., 0].numel())
    assert found == pytest.approx(result.report["corrections"][-1]["after"], rel=1e-4)


def result_recipe(result):
    return slimrank.recipe.Recipe.make(result.report["provenance"]["recipe"])


@pytest.mark.parametrize("form", FORMS)
def test_sizes_ranks_and_what_is_dense_stay(form, calibration):
    plain = compress(tiny_model(), calibration, corrections=0, **form)
    corrected = compress(tiny_model(), calibration, **form)
    assert plain.plan == corrected.plan
    assert plain.report["corrections"] == []
    ours, theirs = compressed_layers(corrected.model), compressed_layers(plain.model)
    assert {p: m.rank for p, m in ours.items()} == {p: m.rank for p, m in theirs.items()}
    for path, layer in ours.items():
        assert not torch.equal(layer.weight, theirs[path].weight)
    inside = tuple(f"{path}." for path in ours)
    rest = {n: p for n, p in plain.model.named_parameters() if not n.startswith(inside)}
    for name, p in corrected.model.named_parameters():
        if not name.startswith(inside):
            assert torch.equal(p, rest[name])


def test_biases_and_dtypes_stay(calibration):
    for name, dtype in itertools.product(["gpt2", "qwen2"], [torch.bfloat16, torch.float16]):
        model = tiny_model(name).to(dtype)
        biases = {n: p.clone() for n, p in model.named_parameters() if n.endswith("bias")}
        result = compress(model, calibration)
        after = {n.replace(".B.bias", ".bias"): p for n, p in result.model.named_parameters() if n.endswith("bias")}
        assert {n: p.dtype for n, p in after.items()} == dict.fromkeys(biases, dtype)
        assert all(torch.equal(after[n], b) for n, b in biases.items())
        assert {p.dtype for p in result.model.parameters()} == {dtype}


def test_a_step_that_does_not_help_is_left_out(calibration, monkeypatch):
    plain = compress(tiny_model(), calibration, corrections=0)
    values = itertools.count(1.0)
    monkeypatch.setattr("slimrank.pipeline.stages.correction.HeldOutCheck.divergence", lambda self, index: next(values))
    result = compress(tiny_model(), calibration)
    assert [r["kept"] for r in result.report["corrections"]] == [False, False]
    for path, layer in compressed_layers(result.model).items():
        assert torch.equal(layer.weight, compressed_layers(plain.model)[path].weight)


def test_nan_is_never_nearer(calibration, monkeypatch):
    monkeypatch.setattr("slimrank.pipeline.stages.correction.HeldOutCheck.divergence", lambda self, index: float("nan"))
    assert not any(r["kept"] for r in compress(tiny_model(), calibration).report["corrections"])


def test_steps_that_go_too_far_for_the_dtype_are_halved(calibration, monkeypatch):
    """In float16 the first trial overflows; the run goes on with what is finite."""
    monkeypatch.setattr("slimrank.pipeline.stages.correction.FIRST_STEP_LENGTH", 2.0**14)
    monkeypatch.setattr("slimrank.pipeline.stages.correction.MAX_TRIALS", 20)
    result = compress(tiny_model().to(torch.float16), calibration, corrections=1)
    assert bool(torch.isfinite(torch.cat([p.flatten() for p in result.model.parameters()])).all())
    (made,) = result.report["corrections"]
    assert made["kept"]
    assert made["after"] < made["before"]


@pytest.mark.parametrize("last", ["_gather", "_move", "_store", "remember"])
@pytest.mark.parametrize("form", FORMS)
def test_an_interrupted_run_goes_on(last, form, calibration, tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "model")
    chosen = {"keep_ratio": 0.6, "calibration": calibration, "corrections": 3, "correction_windows": 2, **SMALL, **form}
    whole = slimrank.compress(folder, **chosen)
    own, calls = getattr(Correction, last), itertools.count()

    def broken(self, *args):
        if next(calls) == (0 if last == "remember" else 1):
            raise KeyboardInterrupt
        return own(self, *args)

    monkeypatch.setattr(Correction, last, broken)
    with pytest.raises(KeyboardInterrupt):
        slimrank.compress(folder, run_dir=tmp_path / "run", **chosen)
    monkeypatch.undo()
    resumed = slimrank.compress(folder, run_dir=tmp_path / "run", **chosen)
    assert resumed.report["corrections"] == whole.report["corrections"]
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_finished_run_computes_nothing_again(calibration, tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "model")
    chosen = {"keep_ratio": 0.6, "calibration": calibration, "corrections": 2, "correction_windows": 2, **SMALL}
    first = slimrank.compress(folder, run_dir=tmp_path / "run", **chosen)

    def never(*_):
        raise AssertionError

    monkeypatch.setattr(Correction, "_gather", never)
    again = slimrank.compress(folder, run_dir=tmp_path / "run", **chosen)
    assert again.report["corrections"] == first.report["corrections"]


def test_corrections_follow_refinement(calibration):
    result = compress(tiny_model(), calibration, refine="regress", refine_options={"held_out": 0})
    assert len(result.report["corrections"]) == 2
    assert any("refined" in row for row in result.report["targets"])


def test_shared_factors_are_refused(calibration):
    with pytest.raises(RecipeError, match="shares between layers"):
        compress(tiny_model(), calibration, method="basis_sharing")
    with pytest.raises(RecipeError, match="shares between layers"):
        slimrank.preview("demo", keep_ratio=0.6, method="basis_sharing", corrections=1)


def test_the_report_shows_them(calibration, tmp_path):
    folder = save_tiny(tmp_path / "model")
    chosen = {"keep_ratio": 0.6, "calibration": calibration, "corrections": 2, "correction_windows": 3, **SMALL}
    result = slimrank.compress(folder, out=tmp_path / "out", **chosen)
    shown = (tmp_path / "out" / "report.md").read_text()
    assert "## Corrections" in shown
    for r in result.report["corrections"]:
        assert f"{r['before']:.4f} | {r['after']:.4f} | {'kept' if r['kept'] else 'undone'}" in shown
    assert {"remember the original", "correct"} <= set(result.report["seconds"])


def test_the_forecast_counts_them(tmp_path):
    folder = save_tiny(tmp_path / "model")
    plain = slimrank.preview(folder, keep_ratio=0.6, method="svd_llm")["seconds"]
    more = slimrank.preview(folder, keep_ratio=0.6, method="svd_llm", corrections=3)["seconds"]
    assert set(more) - set(plain) == {"remember the original", "correct"}
    assert more["correct"] > more["remember the original"] > 0
