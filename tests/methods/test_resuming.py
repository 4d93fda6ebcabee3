"""Runs that are interrupted go on to the same bits."""

import pytest
import torch

import slimrank
from method_runs import (
    BACKWARD,
    FREE,
    METHODS,
    SHARED,
    assert_same,
    compress,
    forbid_passes,
    interrupted_then_resumed,
    interrupting,
    low_rank,
    product,
    result_of,
)


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
