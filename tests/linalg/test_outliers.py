"""Sums of float32 products, where few directions outweigh all others."""

import pytest
import torch

from observed import random
from slimrank.linalg.outliers import DIRECTIONS, hides_small_spectrum
from slimrank.statistics.accumulators import GramSum
from slimrank.statistics.paired_inputs import StreamSums

N, TOKENS = 48, 2000


def tokens(directions, size=3000.0):
    """Inputs of float32 that are `size` times as large along some directions, none of them a channel."""
    rotation = torch.linalg.qr(random(N, N, seed=1)).Q
    spread = torch.ones(N, dtype=torch.float64)
    spread[:directions] = size
    return (random(TOKENS, N) * spread @ rotation).float()


def smallest(gram):
    """The smallest half of the spectrum."""
    return torch.linalg.eigvalsh(gram)[: N // 2]


@pytest.mark.parametrize("directions", [1, 3, DIRECTIONS - 1])
def test_the_small_spectrum_survives_outlier_directions(directions):
    x = tokens(directions)
    sums = GramSum.empty(N)
    assert sums.add(x)
    expected = smallest(x.double().t() @ x.double())
    torch.testing.assert_close(smallest(sums.gram), expected, rtol=1e-8, atol=0)
    lost = smallest((x.t() @ x).double())
    assert float((lost / expected - 1).abs().max()) > 1e-3  # what float32 makes of it


def test_products_of_two_streams_are_as_exact():
    x = tokens(1)
    sums = StreamSums.empty(N, torch.device("cpu"), own=False)
    assert sums.add(x, 2 * x)
    torch.testing.assert_close(sums.cross, 2 * (x.double().t() @ x.double()), rtol=1e-12, atol=1e-6)


def test_ordinary_inputs_and_large_channels_stay_in_float32():
    """Rounding follows each entry, so that a large channel hides nothing."""
    x = random(TOKENS, N).float()
    assert not hides_small_spectrum(x.t() @ x)
    x[:, 5] *= 3000
    assert not hides_small_spectrum(x.t() @ x)
    assert not hides_small_spectrum(torch.zeros(N, N))
    decaying = x * torch.arange(1, N + 1).float() ** -1.0
    assert not hides_small_spectrum(decaying.t() @ decaying)
