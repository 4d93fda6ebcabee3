"""The divergence of distributions of tokens, near to each other and far apart."""

import pytest
import torch
from torch.nn.functional import log_softmax

from slimrank.models.divergence import divergence


def pair(scale, vocabulary=5000, rows=64, seed=0):
    """Logits of a model, and of one that is so far from it, as float32."""
    g = torch.Generator().manual_seed(seed)
    z = 5 * torch.randn(rows, vocabulary, generator=g)
    return z, z + scale * torch.randn(rows, vocabulary, generator=g)


def exact(z, changed):
    p, q = (log_softmax(logits.double(), dim=-1) for logits in (z, changed))
    d = q - p
    return float((p.exp() * (torch.expm1(d) - d)).sum())


@pytest.mark.parametrize("scale", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0])
def test_equals_float64(scale):
    z, changed = pair(scale)
    found = divergence(log_softmax(z, dim=-1), log_softmax(changed, dim=-1))
    assert found == pytest.approx(exact(z, changed), rel=2e-3)


@pytest.mark.parametrize("scale", [0.0, 1e-7, 1e-6, 1e-5])
def test_rounding_is_less_than_a_billionth_of_a_nat_and_never_negative(scale):
    for seed in range(3):
        z, changed = pair(scale, seed=seed)
        found = divergence(log_softmax(z, dim=-1), log_softmax(changed, dim=-1)) / len(z)
        assert found >= 0
        assert found == pytest.approx(exact(z, changed) / len(z), abs=2e-11)


def test_tokens_that_one_of_them_rules_out():
    z, changed = pair(0.1)
    expected = exact(z[:, 10:], changed[:, 10:])
    z[:, :10] = changed[:, :10] = -torch.inf
    assert divergence(log_softmax(z, -1), log_softmax(changed, -1)) == pytest.approx(expected, rel=1e-3)
    other = changed.clone()
    other[:, 20] = -torch.inf
    assert divergence(log_softmax(z, -1), log_softmax(other, -1)) == torch.inf
    ruled_out = -torch.log1p(-log_softmax(changed, -1)[:, 20].exp()).sum()
    assert divergence(log_softmax(other, -1), log_softmax(changed, -1)) == pytest.approx(float(ruled_out), rel=1e-3)


def test_distributions_that_have_nothing_in_common():
    z = torch.tensor([[200.0, 0.0, -200.0]])
    assert divergence(log_softmax(z, -1), log_softmax(-z, -1)) == pytest.approx(400)


def test_a_token_that_one_rules_out_all_but_for_a_denormal_number():
    first, second = torch.zeros(2, 2000)
    first[0], second[0] = -95.0, 3.0
    log_p, log_q = log_softmax(first.double(), dim=-1), log_softmax(second.double(), dim=-1)
    expected = float((log_p.exp() * (log_p - log_q)).sum())
    assert divergence(log_p.float(), log_q.float()) == pytest.approx(expected, rel=1e-5)
