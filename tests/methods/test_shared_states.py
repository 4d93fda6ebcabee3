"""Whole runs on models whose blocks hand keys and values, or chosen tokens, to later blocks."""

import functools

import pytest
import torch
from test_refining import check_refined
from torch.nn.functional import log_softmax

from architectures import hands_on, random_model
from method_runs import assert_same, compress, interrupted_then_resumed, low_rank, product
from slimrank.layers.experts import unfuse
from slimrank.models.contexts import swapped
from slimrank.pipeline.stages.model_probe import ModelProbe

HANDING = [name for name in ("gemma3n", "gemma4", "glm_moe_dsa") if hands_on(name)]
SEARCH = {"search_samples": 3}


@pytest.mark.parametrize("name", HANDING)
def test_resident_and_streamed_agree(name, monkeypatch):
    monkeypatch.setattr("slimrank.models.gradients.LOGITS_AT_ONCE", 1)
    streamed, resident = (compress(random_model(name), method="kfac_svd", resident=r) for r in (False, True))
    for path, layer in low_rank(streamed.model).items():
        one, other = product(layer), product(resident.model.get_submodule(path))
        assert float((one - other).norm() / one.norm()) < 1e-3


@pytest.mark.parametrize("name", HANDING)
def test_refined_against_the_finished_model(name):
    """Errors are those of raw tokens through both whole models, in float64: neither stream reads the other's states."""
    settings = {"anchor": 1, "ridge": 0.0, "held_out": 0, "residual": False}
    result = compress(random_model(name).double(), refine="regress", refine_options=settings)
    dense = random_model(name).double()
    unfuse(dense)  # fused experts know no float64
    rows = result.report["targets"]
    others = [".experts.", ".altup."]  # refined towards themselves; called twice
    others += [".down_proj"] if name == "gemma3n" else []  # it has several residual streams
    refined = [row["path"] for row in rows if "refined" in row and not any(other in row["path"] for other in others)]
    assert refined
    check_refined(result, dense, 1, "none", paths=refined, rel=1e-6, residual=False)


@pytest.mark.parametrize("name", HANDING)
@pytest.mark.parametrize("stage, after", [("calibrate and decompose", 5), ("cut and refine factors", 2)])
def test_resuming_gives_the_same_bits(name, stage, after, tmp_path):
    options = {"method": "kfac_svd", "refine": "regress", "refine_options": {"held_out": 2}, **SEARCH}
    resumed, notes = interrupted_then_resumed(tmp_path, stage, after, lambda: random_model(name), **options)
    assert notes[-1].startswith("resuming at block ")
    assert_same(resumed, whole(name))


@functools.cache
def whole(name):
    options = {"method": "kfac_svd", "refine": "regress", "refine_options": {"held_out": 2}, **SEARCH}
    return compress(random_model(name), **options)


@pytest.mark.parametrize("name", HANDING)
def test_measured_effects_are_those_of_the_whole_model(name, monkeypatch):
    """The last cut of every block, against whole passes."""
    seen, real = [], ModelProbe._block

    def spy(self, index, states, cuts):
        found = real(self, index, states, cuts)
        path, rank = cuts[-1]
        seen.append((index, found[path][str(rank)][0], divergence(self, path, rank)))
        return found

    monkeypatch.setattr(ModelProbe, "_block", spy)
    compress(random_model(name), allocation="lems", **SEARCH)
    assert len({index for index, _, _ in seen}) > 2
    for _, found, expected in seen:
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-10)


def divergence(probe, path, rank):
    """KL in nats a token, from the logits of whole passes, in float64."""
    model, temperature, dropped = probe.state.model, probe._scorer.temperature, probe._scorer.dropped
    windows = torch.cat([batch.input_ids for batch in probe._batches])
    before = model(input_ids=windows).logits[:, dropped:].double()
    with swapped(model, probe.spectra.layers(probe.units[path], rank)):
        after = model(input_ids=windows).logits[:, dropped:].double()
    p, q = (log_softmax(logits / temperature, dim=-1) for logits in (before, after))
    return float((p.exp() * (p - q)).sum()) / p[..., 0].numel()


@pytest.mark.parametrize("name", HANDING)
@pytest.mark.parametrize("allocation", ["fermigrad", "ada_cr"])
def test_allocations_that_measure(allocation, name):
    options = {"steps": 4} if allocation == "fermigrad" else {}
    result = compress(
        random_model(name), allocation=allocation, allocation_options=options, method="kfac_svd", **SEARCH
    )
    assert low_rank(result.model)


@pytest.mark.parametrize("name", HANDING)
def test_corrections_get_nearer(name):
    rounds = compress(random_model(name), corrections=1, correction_windows=2, **SEARCH).report["corrections"]
    assert rounds[0]["kept"]
    assert rounds[0]["after"] < rounds[0]["before"]
