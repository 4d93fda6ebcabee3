import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimrank.layers.forms import PIVOT
from slimrank.linalg.pivot import _exchanged, _leading_rows, pivoted

EPS = torch.finfo(torch.float64).eps
LARGEST = 2.0
SHAPES = [(12, 20, 5), (20, 12, 5), (16, 16, 7), (9, 30, 1), (30, 9, 1), (12, 20, 12), (20, 12, 12), (1, 6, 1)]


def factors(m, n, r, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(r, n, generator=g, dtype=dtype), torch.randn(m, r, generator=g, dtype=dtype)


def rebuilt(p):
    """The matrix out of its parts, by what the docstring says of them."""
    if p.side == "out":
        return torch.cat([p.skeleton, p.interpolation @ p.skeleton])[p.order]
    parts = torch.cat([p.skeleton, p.skeleton @ p.interpolation], 1)
    w = torch.empty_like(parts)
    w[:, p.order.long()] = parts
    return w


def error(p, a, b):
    """Relative to what rounding is relative to: the sizes of the terms, not their sum."""
    scale = b.norm(dim=0) @ a.norm(dim=1)
    return float((rebuilt(p) - b @ a).norm() / scale)


@pytest.mark.parametrize("side", ["out", "in", None])
@pytest.mark.parametrize("m, n, r", SHAPES)
def test_nothing_is_lost(m, n, r, side):
    a, b = factors(m, n, r)
    p = pivoted(a, b, side)
    assert p.side == (side or ("out" if m <= n else "in"))
    assert float((rebuilt(p) - b @ a).norm() / (b @ a).norm()) < 100 * EPS
    assert p.skeleton.dtype == p.interpolation.dtype == torch.float64
    assert p.skeleton.shape == ((r, n) if p.side == "out" else (m, r))
    assert p.interpolation.shape == ((m - r, r) if p.side == "out" else (r, n - r))
    assert p.skeleton.numel() + p.interpolation.numel() == PIVOT.parameters(m, n, r)


@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize("m, n, r", SHAPES)
def test_pivots_are_rows_or_columns_themselves_in_order(m, n, r, side):
    a, b = factors(m, n, r)
    p = pivoted(a, b, side)
    assert p.order.dtype == torch.int32
    assert sorted(p.order.tolist()) == list(range(m if side == "out" else n))
    places = (p.order.argsort() if side == "out" else p.order).tolist()
    assert places[:r] == sorted(places[:r])
    assert places[r:] == sorted(places[r:])
    w = b @ a
    torch.testing.assert_close(p.skeleton, w[places[:r]] if side == "out" else w[:, places[:r]], rtol=1e-13, atol=1e-13)
    # the pivots themselves carry no rounding of T: the identity block is exact
    own = rebuilt(p)[places[:r]] if side == "out" else rebuilt(p)[:, places[:r]]
    assert torch.equal(own, p.skeleton)


def growing(m, r):
    """A unit lower triangle like Wilkinson's: elimination keeps its rows, in which the others have entries of 1.9^r."""
    b = torch.eye(m, r, dtype=torch.float64) - 0.9 * torch.ones(m, r, dtype=torch.float64).tril(-1)
    b[r:] = 0.9
    return b


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("m, n, r", [(64, 64, 20), (64, 80, 60), (200, 210, 100)])
def test_no_entry_is_large(m, n, r, seed):
    a, b = factors(m, n, r, seed)
    for side in ("out", "in"):
        assert float(pivoted(a, b, side).interpolation.abs().max()) <= LARGEST * (1 + 1e-9)


@pytest.mark.parametrize("r", [8, 24])
def test_exchanges_are_needed_and_do_it(r, monkeypatch):
    """Elimination alone leaves entries far above the bound."""
    a, b = factors(r + 6, r + 9, r)[0], growing(r + 6, r)
    assert float(pivoted(a, b, "out").interpolation.abs().max()) <= LARGEST * (1 + 1e-9)
    monkeypatch.setattr("slimrank.linalg.pivot.LARGEST", float("inf"))
    assert float(pivoted(a, b, "out").interpolation.abs().max()) > 1.5**r


def test_exchanges_keep_track_of_what_they_change():
    q = torch.linalg.qr(growing(40, 24)).Q
    pivots, rest, t = _leading_rows(q)
    before = pivots.clone()
    pivots, rest = _exchanged(pivots, rest, t)
    assert (pivots != before).any()
    torch.testing.assert_close(t, torch.linalg.solve(q[pivots], q[rest], left=False), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize("which", ["A", "B", "both", "zero"])
def test_factors_that_lack_rank(which, side):
    a, b = factors(14, 18, 6)
    if which in ("B", "both"):
        b[:, 4:] = b[:, :2]
    if which in ("A", "both"):
        a[3] = 0
    if which == "zero":
        a, b = a * 0, b * 0
    p = pivoted(a, b, side)
    assert error(p, a, b) < 100 * EPS or which == "zero"
    torch.testing.assert_close(rebuilt(p), b @ a, rtol=1e-13, atol=1e-12)
    assert float(p.interpolation.abs().max()) <= LARGEST * (1 + 1e-9)


@pytest.mark.parametrize("side", ["out", "in"])
def test_rows_and_columns_that_repeat(side):
    a, b = factors(16, 15, 5)
    b[8:] = b[:8]
    a[:, 7:14] = a[:, :7]
    p = pivoted(a, b, side)
    assert error(p, a, b) < 100 * EPS
    assert float(p.interpolation.abs().max()) <= LARGEST * (1 + 1e-9)


@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize("inverse", [True, False])
def test_badly_scaled_factors(side, inverse):
    a, b = factors(20, 24, 9)
    scales = torch.logspace(-8, 8, 9, dtype=torch.float64)
    b = b * scales
    a = a / scales[:, None] if inverse else a
    p = pivoted(a, b, side)
    assert error(p, a, b) < 100 * EPS
    assert float(p.interpolation.abs().max()) <= LARGEST * (1 + 1e-9)


def test_another_scale_or_basis_of_the_factors_is_the_same_matrix():
    a, b = factors(20, 24, 9)
    g = torch.Generator().manual_seed(1)
    mix = torch.randn(9, 9, generator=g, dtype=torch.float64)
    p, q = pivoted(a, b), pivoted(torch.linalg.solve(mix, a), b @ mix)
    torch.testing.assert_close(rebuilt(p), rebuilt(q), rtol=1e-9, atol=1e-9)


def test_single_precision_in_double_precision_out():
    a, b = factors(12, 20, 5, dtype=torch.float32)
    p, q = pivoted(a, b), pivoted(a.double(), b.double())
    for mine, other in ((p.skeleton, q.skeleton), (p.interpolation, q.interpolation), (p.order, q.order)):
        assert torch.equal(mine, other)


def test_arguments_stay_as_they_are():
    a, b = factors(12, 20, 5)
    before = a.clone(), b.clone()
    pivoted(a, b)
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


@pytest.mark.parametrize("m, n, r", [(5, 8, 6), (8, 5, 6), (5, 5, 6)])
@pytest.mark.parametrize("side", ["out", "in", None])
def test_ranks_beyond_the_shape_are_refused(m, n, r, side):
    with pytest.raises(ValueError, match=r"outside 1\.\.5"):
        pivoted(*factors(m, n, r), side)


def test_numbers_that_are_not_finite_end():
    a, b = factors(12, 20, 5)
    b[3, 2] = float("nan")
    try:
        p = pivoted(a, b)
    except RuntimeError:
        return
    assert not bool(torch.isfinite(rebuilt(p)).all())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.floats(0, 1), st.integers(0, 99), st.sampled_from(["out", "in"]))
def test_any_shape(m, n, fraction, seed, side):
    r = 1 + round(fraction * (min(m, n) - 1))
    a, b = factors(m, n, r, seed)
    p = pivoted(a, b, side)
    assert error(p, a, b) < 100 * EPS
    assert p.interpolation.numel() == 0 or float(p.interpolation.abs().max()) <= LARGEST * (1 + 1e-9)
