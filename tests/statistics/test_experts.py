"""Grams of experts that few tokens reach."""

import pytest
import torch

from observed import random
from slimrank.statistics.accumulators import GramSum
from slimrank.statistics.experts import UNREACHED, shrink_rare_experts, shrunk, trust_in_all
from slimrank.statistics.layer_statistics import LayerStatistics

N, NEEDS = 6, frozenset({"column"})


def sums(rows):
    found = GramSum.empty(rows.shape[1])
    found.add(rows)
    return found


def gathered(*rows):
    return {f"e.{i}": LayerStatistics((4, N), NEEDS, inputs=sums(r), tokens=len(r)) for i, r in enumerate(rows)}


def lean(statistics, count):
    shrink_rare_experts(statistics, [{f"e.{i}": (4, N) for i in range(count)}], NEEDS)
    return statistics


def test_the_weight_is_that_of_the_formula():
    own, others = random(9, N), random(40, N, seed=1) * torch.arange(1, N + 1)
    mine, mean = own.t() @ own / 9, (own.t() @ own + others.t() @ others) / 49
    noise = mine.trace() ** 2 + torch.linalg.matrix_norm(mine) ** 2
    expected = min(1.0, float(noise / (9 * torch.linalg.matrix_norm(mine - mean) ** 2)))
    assert 0 < expected < 1
    pooled = sums(own) + sums(others)
    assert trust_in_all(sums(own), pooled) == pytest.approx(expected)
    found = shrunk(sums(own), pooled)
    torch.testing.assert_close(found.gram / 9, (1 - expected) * mine + expected * mean)
    assert found.count == 9


def test_it_brings_the_gram_of_few_tokens_nearer_to_the_truth():
    """Averaged over many draws: nearer than the sample's own gram, and than that of all experts."""
    scales = [torch.linspace(1, 2, N, dtype=torch.float64), torch.linspace(2, 1, N, dtype=torch.float64)]
    truth, errors = torch.diag(scales[0] ** 2), torch.zeros(3)
    for seed in range(200):
        few, many = random(12, N, seed=seed) * scales[0], random(300, N, seed=1000 + seed) * scales[1]
        own, pooled = sums(few), sums(few) + sums(many)
        for i, gram in enumerate((own, shrunk(own, pooled), pooled)):
            errors[i] += float((gram.gram / gram.count - truth).square().sum())
    assert errors[1] < 0.9 * errors[0]
    assert errors[1] < 0.9 * errors[2]


def test_many_tokens_count_for_themselves():
    own, others = random(20_000, N), random(20_000, N, seed=1) * torch.arange(1, N + 1)
    assert trust_in_all(sums(own), sums(own) + sums(others)) < 0.01


def test_an_expert_that_gets_all_tokens_keeps_its_gram():
    rows = random(30, N)
    found = lean(gathered(rows), 1)["e.0"]
    torch.testing.assert_close(found.inputs.gram, rows.t() @ rows)


def test_experts_that_no_token_reached_get_a_token_of_the_mean():
    rows = [random(30, N), random(20, N, seed=1)]
    found = lean(gathered(*rows), 3)["e.2"]
    tokens = torch.cat(rows)
    torch.testing.assert_close(found.inputs.gram, tokens.t() @ tokens / 50)
    assert (found.tokens, found.inputs.count, found.shape) == (0, 0, (4, N))
    assert found.notes == (UNREACHED,)


def test_nothing_is_made_of_nothing():
    statistics = {"e.0": LayerStatistics((4, N), NEEDS)}
    assert lean(statistics, 2) is statistics
    assert list(statistics) == ["e.0"]
    assert statistics["e.0"].inputs is None


def test_the_order_of_experts_does_not_matter():
    rows = [random(9, N), random(20, N, seed=1), random(3, N, seed=2)]
    one = lean(gathered(*rows), 3)
    other = gathered(*rows)
    shrink_rare_experts(other, [{f"e.{i}": (4, N) for i in (2, 0, 1)}], NEEDS)
    for path in one:
        torch.testing.assert_close(one[path].inputs.gram, other[path].inputs.gram)
