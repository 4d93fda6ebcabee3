"""Statistics that one method has gathered serve the others: no second pass over the text, and the same model."""

import pytest
import torch

import slimrank
from architectures import random_model
from helpers import byte_tokenizer, text
from slimrank.layers.base import compressed_layers
from slimrank.pipeline.stages.statistics_cache import StatisticsCache
from slimrank.progress import Progress
from slimrank.statistics.catalogue import GatherOptions
from slimrank.statistics.layer_statistics import LayerStatistics
from slimrank.store import Run

OPTIONS = {"keep_ratio": 0.6, "calibration": (text(400),), "samples": 4, "seq_len": 24, "evaluation": None}
PASSES = ("embed", "step", "run")


def compress(name="llama", **options):
    return slimrank.compress(random_model(name), byte_tokenizer(), **{**OPTIONS, **options})


def forbid_passes(monkeypatch):
    """Any pass over the calibration text fails from here on."""
    for name in PASSES:
        monkeypatch.setattr(f"slimrank.models.blocks.BlockRunner.{name}", None)
    monkeypatch.setattr("slimrank.pipeline.stages.calibration_ways.whole_model_gradients", None)


def products(result):
    return {path: b @ a for path, layer in compressed_layers(result.model).items() for a, b in [layer.factors()]}


def assert_like(found, expected, **tolerance):
    ours, theirs = products(found), products(expected)
    assert ours.keys() == theirs.keys()
    for path, product in ours.items():
        torch.testing.assert_close(product, theirs[path], **tolerance)
    assert found.report["notes"] == expected.report["notes"]


SAME = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # the same form, summed over inputs in the place of outputs or in another pass


PAIRS = [
    ("svd_llm", "svd_llm_v2", SAME),
    ("svd_llm", "coala", SAME),
    ("drone", "svd_llm", CLOSE),
    ("kfac_svd", "svd_llm", CLOSE),
    ("fwsvd", "fwsvd", SAME),
    ("asvd", "asvd", SAME),
]


@pytest.mark.parametrize(
    "name, first, then, tolerance",
    [(name, *pair) for name in ("llama", "gpt2", "mixtral") for pair in PAIRS]
    + [("llama", "drone", "basis_sharing", SAME)],  # which waits for the next block
)
def test_another_method_reads_no_text(name, first, then, tolerance, tmp_path, monkeypatch):
    kept = {"run_dir": tmp_path, "keep_statistics": True}
    compress(name, method=first, **kept)
    forbid_passes(monkeypatch)
    found = compress(name, method=then, keep_ratio=0.5, **kept)
    monkeypatch.undo()
    assert_like(found, compress(name, method=then, keep_ratio=0.5), **tolerance)


@pytest.mark.parametrize("resident", [False, True])
def test_other_options_of_a_method_read_no_text(resident, tmp_path, monkeypatch):
    kept = {"run_dir": tmp_path, "keep_statistics": True, "method": "kfac_svd", "resident": resident}
    compress(**kept)
    forbid_passes(monkeypatch)
    found = compress(method_options={"row_shrink": 0.01}, **kept)
    monkeypatch.undo()
    expected = compress(method="kfac_svd", method_options={"row_shrink": 0.01}, resident=resident)
    assert_like(found, expected, **SAME)


def test_two_passes_gather_all_that_a_third_method_needs(tmp_path, monkeypatch):
    """The kinds may come from different methods."""
    kept = {"run_dir": tmp_path, "keep_statistics": True}
    compress(method="svd_llm", **kept)
    compress(method="fwsvd", **kept)
    forbid_passes(monkeypatch)
    with pytest.raises(TypeError):
        compress(method="kfac_svd", **kept)
    compress(method="coala", **kept)


def test_what_was_gathered_otherwise_does_not_serve(tmp_path, monkeypatch):
    kept = {"run_dir": tmp_path, "keep_statistics": True, "method": "kfac_svd"}
    compress(**kept)
    found = compress(method_options={"trim": 0.25}, **kept)
    assert_like(found, compress(method="kfac_svd", method_options={"trim": 0.25}), **SAME)
    forbid_passes(monkeypatch)
    with pytest.raises(TypeError):
        compress(method_options={"clip": None}, **kept)


def test_statistics_that_depend_on_ranks_are_not_kept(tmp_path, monkeypatch):
    """dobi_svd truncates what it sees: its stream is no longer the original's."""
    kept = {"run_dir": tmp_path, "keep_statistics": True}
    compress(method="dobi_svd", **kept)
    forbid_passes(monkeypatch)
    with pytest.raises(TypeError):
        compress(method="dobi_svd", keep_ratio=0.5, **kept)


def test_they_are_not_kept_unasked(tmp_path, monkeypatch):
    compress(method="svd_llm", run_dir=tmp_path)
    assert not list(tmp_path.rglob("column-*"))
    forbid_passes(monkeypatch)
    with pytest.raises(TypeError):
        compress(method="svd_llm_v2", run_dir=tmp_path, keep_statistics=True)


@pytest.mark.parametrize("method", ["svd_llm", "kfac_svd"])
def test_an_interrupted_pass_goes_on_and_keeps_all(method, tmp_path, monkeypatch):
    progress, steps = Progress(), []

    def step(done=1):
        steps.append(done)
        if len(steps) == (1 if method == "svd_llm" else 3):
            raise KeyboardInterrupt

    progress.step = step
    kept = {"run_dir": tmp_path, "keep_statistics": True, "method": method}
    with pytest.raises(KeyboardInterrupt):
        compress(progress=progress, **kept)
    compress(**kept)
    forbid_passes(monkeypatch)
    found = compress(method="svd_llm_v2", run_dir=tmp_path, keep_statistics=True)
    monkeypatch.undo()
    assert_like(found, compress(method="svd_llm_v2"), **CLOSE)


@pytest.mark.parametrize("then", ["svd_llm_v2", "kfac_svd"])
def test_decomposing_from_kept_statistics_goes_on_where_it_was(then, tmp_path, monkeypatch):
    """Blocks that are done are not solved again."""
    kept = {"run_dir": tmp_path, "keep_statistics": True}
    compress(method=then if then == "kfac_svd" else "svd_llm", **kept)
    changed = {"method": then, "method_options": {"row_shrink": 0.2}} if then == "kfac_svd" else {"method": then}
    progress, steps = Progress(), []

    def step(done=1):
        steps.append(done)
        raise KeyboardInterrupt

    progress.step = step
    with pytest.raises(KeyboardInterrupt):
        compress(progress=progress, **changed, **kept)
    solved, solve = [], slimrank.methods.decomposer.Configured.solve
    monkeypatch.setattr(
        "slimrank.methods.decomposer.Configured.solve", lambda self, w, s: solved.append(1) or solve(self, w, s)
    )
    found = compress(**changed, **kept)
    assert len(solved) == len(found.plan.targets) // 2  # one of two blocks
    monkeypatch.undo()
    assert_like(found, compress(**changed), **SAME)


def test_notes_of_all_kinds_come_back(tmp_path):
    """What was unusual about the inputs is not lost where the gradients were gathered by another method."""
    with Run(tmp_path, {}) as run:
        kept = StatisticsCache(run.store({}), 1, torch.device("cpu"))
        for need, notes in (("column", ("both", "inputs")), ("row", ("both", "gradients"))):
            gathering = GatherOptions(needs=frozenset({need}))
            kept.save(0, {"q": LayerStatistics((2, 3), gathering.needs, notes=notes)}, {}, gathering)
        both = GatherOptions(needs=frozenset({"column", "row"}))
        statistics, _ = kept.load(0, kept.sources(both), both, {})
    assert statistics["q"].notes == ("both", "inputs", "gradients")


def test_statistics_are_kept_somewhere():
    with pytest.raises(slimrank.SlimrankError, match="stored in a run directory"):
        compress(method="svd_llm", keep_statistics=True)
