"""Whole runs on models whose blocks hand keys and values, or chosen tokens, to later blocks."""

import functools

import pytest
import torch
from torch.nn.functional import log_softmax

from architectures import random_model
from method_runs import assert_same, compress, interrupted_then_resumed, low_rank, product
from slimrank.pipeline.probe import ModelProbe
from test_refining import check_refined

HANDING = ["gemma3n", "gemma4", "glm_moe_dsa"]
SEARCH = {"search_samples": 3}


@pytest.mark.parametrize("name", HANDING)
@pytest.mark.parametrize("method", ["kfac_svd", "fwsvd", "gfwsvd"])
def test_resident_and_streamed_agree(method, name, monkeypatch):
    monkeypatch.setattr("slimrank.models.gradients.LOGITS_AT_ONCE", 1)
    streamed, resident = (compress(random_model(name), method=method, resident=r) for r in (False, True))
    for path, layer in low_rank(streamed.model).items():
        one, other = product(layer), product(resident.model.get_submodule(path))
        assert float((one - other).norm() / one.norm()) < 1e-3


@pytest.mark.parametrize("name", HANDING)
def test_refined_against_the_finished_model(name):
    """Errors are those of raw tokens through both whole models, in float64: neither stream reads the other's states."""
    settings = {"anchor": 1, "ridge": 0.0, "held_out": 0, "residual": False}
    result = compress(random_model(name).double(), refine="regress", refine_options=settings, ignore=("*experts*",))
    dense = random_model(name).double()
    refined = [row["path"] for row in result.report["targets"] if "refined" in row]
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
    """Of single cuts, from the first block or a later one, and of a plan."""
    seen, real = [], ModelProbe._block

    def spy(self, index, states, cuts):
        found = real(self, index, states, cuts)
        seen.append((self, dict(list(cuts)[-1:]), found))
        return found

    monkeypatch.setattr(ModelProbe, "_block", spy)
    compress(random_model(name), allocation="lems", **SEARCH)
    model = random_model(name)
    assert len(seen) == len({min(probe.units[p].blocks) for probe, cuts, _ in seen for p in cuts})
    for probe, cuts, found in seen:
        ((path, rank),) = cuts.items()
        measuring = probe._scorer
        expected = divergence(model, probe, path, rank, measuring.temperature, measuring.dropped)
        assert found[path][str(rank)][0] == pytest.approx(expected, rel=1e-3, abs=1e-10)


def divergence(model, probe, path, rank, temperature, dropped):
    """KL in nats a token, from whole passes in float64 of the logits."""
    from slimrank.layers.experts import unfuse
    from slimrank.models.swap import swapped

    unfuse(model)
    windows = torch.cat([batch.input_ids for batch in probe._batches])
    with torch.no_grad():
        before = model(input_ids=windows).logits[:, dropped:].double() / temperature
        with swapped(model, probe.spectra.layers(probe.units[path], rank)):
            after = model(input_ids=windows).logits[:, dropped:].double() / temperature
    p, q = log_softmax(before, -1), log_softmax(after, -1)
    return float((p.exp() * (p - q)).sum()) / p[..., 0].numel()


@pytest.mark.parametrize("name", HANDING)
@pytest.mark.parametrize("allocation", ["fermigrad", "ada_cr"])
def test_allocations_that_measure(allocation, name):
    options = {"steps": 4} if allocation == "fermigrad" else {}
    result = compress(random_model(name), allocation=allocation, allocation_options=options, method="kfac_svd", **SEARCH)
    assert low_rank(result.model)


@pytest.mark.parametrize("name", HANDING)
def test_corrections_get_nearer(name):
    rounds = compress(random_model(name), corrections=1, correction_windows=2, **SEARCH).report["corrections"]
    assert rounds[0]["kept"]
    assert rounds[0]["after"] < rounds[0]["before"]
