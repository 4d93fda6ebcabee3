import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimrank.linalg.eigen import descending_eigen
from slimrank.linalg.forms import Metric
from slimrank.linalg.lowrank import solve as solve_in
from slimrank.linalg.roots import make_root
from slimrank.linalg.symmetric import congruence, gram
from slimrank.statistics.accumulators import GramSum

SHAPES = [(7, 7), (5, 12), (12, 5), (1, 6), (6, 1)]


def solve(w, column=None):
    return solve_in(w, Metric.of(column=column))


def problem(m, n, tokens=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(m, n, generator=g, dtype=torch.float64)
    x = torch.randn(n, tokens or 4 * n, generator=g, dtype=torch.float64)
    return w, x


def loss(w, w2, x):
    return float(((w - w2) @ x).square().sum())


def whitened_reference(w, x, rank):
    """F1, as the papers write it: the explicit inverse of a Cholesky factor."""
    s = torch.linalg.cholesky(x @ x.T)
    u, sigma, vt = torch.linalg.svd(w @ s, full_matrices=False)
    return u[:, :rank] * sigma[:rank] @ vt[:rank] @ torch.linalg.inv(s), sigma


@pytest.mark.parametrize("m, n", SHAPES)
def test_equals_the_whitened_svd_of_the_papers(m, n):
    w, x = problem(m, n)
    spectrum = solve(w, x @ x.T)
    for rank in range(1, min(m, n) + 1):
        reference, sigma = whitened_reference(w, x, rank)
        a, b = spectrum.factors(w, rank)
        torch.testing.assert_close(b @ a, reference, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(spectrum.values, sigma, rtol=1e-8, atol=1e-8 * float(sigma[0]))


@pytest.mark.parametrize("m, n", SHAPES)
def test_without_a_metric_it_is_the_plain_svd(m, n):
    w, _ = problem(m, n)
    u, sigma, vt = torch.linalg.svd(w, full_matrices=False)
    rank = max(1, min(m, n) - 1)
    a, b = solve(w).factors(w, rank)
    torch.testing.assert_close(b @ a, u[:, :rank] * sigma[:rank] @ vt[:rank], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("m, n", SHAPES)
def test_loss_is_the_tail_of_the_spectrum(m, n):
    w, x = problem(m, n)
    spectrum = solve(w, x @ x.T)
    for rank in range(1, min(m, n) + 1):
        a, b = spectrum.factors(w, rank)
        assert loss(w, b @ a, x) == pytest.approx(spectrum.tail(rank), rel=1e-8, abs=1e-8 * spectrum.tail(0))
        expected = (spectrum.tail(rank) / spectrum.tail(0)) ** 0.5
        assert spectrum.relative_error(rank) == pytest.approx(expected)


@pytest.mark.parametrize("m, n", SHAPES)
def test_factors_are_nested_and_canonical(m, n):
    w, x = problem(m, n)
    spectrum = solve(w, x @ x.T)
    full_a, full_b = spectrum.factors(w, min(m, n))
    for rank in range(1, min(m, n)):
        a, b = spectrum.factors(w, rank)
        torch.testing.assert_close(b, full_b[:, :rank], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(a, full_a[:rank], rtol=1e-8, atol=1e-8)
    largest = full_b.gather(0, full_b.abs().argmax(0, keepdim=True))
    assert bool((largest > 0).all())
    torch.testing.assert_close(full_b.T @ full_b, torch.eye(min(m, n), dtype=torch.float64))


@pytest.mark.parametrize("m, n", SHAPES)
def test_full_rank_is_exact_even_where_the_gram_is_singular(m, n):
    w, x = problem(m, n, tokens=2)
    a, b = solve(w, x @ x.T).factors(w, min(m, n))
    torch.testing.assert_close(b @ a, w, rtol=1e-8, atol=1e-8)


def test_no_alternating_solution_is_better():
    w, x = problem(6, 9)
    c = x @ x.T
    best = solve(w, c).tail(2)
    g = torch.Generator().manual_seed(1)
    for _ in range(50):
        a = torch.randn(2, 9, generator=g, dtype=torch.float64)
        for _ in range(30):
            b = w @ c @ a.T @ torch.linalg.inv(a @ c @ a.T)
            a = torch.linalg.lstsq(b, w).solution
        assert loss(w, b @ a, x) >= best * (1 - 1e-9)


@pytest.mark.parametrize("m, n", [(8, 5), (5, 8)])
def test_scale_of_the_gram_does_not_matter(m, n):
    w, x = problem(m, n)
    a, b = solve(w, x @ x.T).factors(w, 3)
    a2, b2 = solve(w, 1e6 * (x @ x.T)).factors(w, 3)
    torch.testing.assert_close(b2 @ a2, b @ a, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("m, n", [(8, 5), (5, 8)])
def test_orthogonal_transformation_of_the_output(m, n):
    w, x = problem(m, n)
    q = torch.linalg.qr(problem(m, m, seed=3)[0]).Q
    a, b = solve(w, x @ x.T).factors(w, 3)
    a2, b2 = solve(q @ w, x @ x.T).factors(q @ w, 3)
    torch.testing.assert_close(b2 @ a2, q @ b @ a, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("m, n", [(20, 16), (16, 20)])
def test_one_channel_3000_times_the_others(m, n):
    """Float32 inputs with a massive activation: within 1e-3 of the float64 loss, where a shifted Cholesky is not."""
    w, x = problem(m, n, tokens=400)
    x[3] *= 3000
    stats = GramSum.empty(n)
    stats.add(x.T.float())
    a, b = solve(w, stats.gram).factors(w, 8)
    assert loss(w, b @ a, x) <= solve(w, x @ x.T).tail(8) * (1 + 1e-3)


@pytest.mark.parametrize("m, n", [(9, 6), (6, 9)])
def test_dead_channels_and_no_tokens(m, n):
    w, x = problem(m, n)
    x[2] = 0
    a, b = solve(w, x @ x.T).factors(w, 4)
    assert bool(torch.isfinite(b @ a).all())
    nothing = solve(w, torch.zeros(n, n))
    assert torch.equal(nothing.values, solve(w).values)
    assert "plain SVD" in nothing.notes[0]
    assert solve(torch.zeros(m, n)).relative_error(1) == 0.0
    a, b = nothing.factors(w, min(m, n))
    torch.testing.assert_close(b @ a, w, rtol=1e-7, atol=1e-7)


def test_a_singular_gram_is_noted_not_hidden():
    w, x = problem(12, 8, tokens=3)
    notes = solve(w, x @ x.T).notes
    assert any("rank-deficient: 5 of 8" in note for note in notes)


def test_ranks_out_of_range_are_refused():
    w, _ = problem(4, 6)
    for rank in (0, 5, -1):
        with pytest.raises(ValueError, match=r"outside 1\.\.4"):
            solve(w).factors(w, rank)


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_symmetric_products(n, tokens, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=g, dtype=torch.float64)
    c = gram(x)
    torch.testing.assert_close(c, x.T @ x, rtol=1e-10, atol=1e-10)
    assert bool((c == c.T).all())
    w = torch.randn(5, n, generator=g, dtype=torch.float64)
    torch.testing.assert_close(congruence(w, c), w @ c @ w.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["cholesky", "eigen", "pseudo"])
def test_roots(kind):
    _, x = problem(1, 6)
    c = x @ x.T
    identity = torch.eye(6, dtype=torch.float64)
    root = make_root(c, kind)
    r = root.times(identity)
    torch.testing.assert_close(r @ r.T, c)
    torch.testing.assert_close(root.inverse_transpose_times(identity), torch.linalg.inv(r).T)
    torch.testing.assert_close(root.congruence(c), r.T @ c @ r)
    assert root.notes == ()
    singular = x[:, :2] @ x[:, :2].T
    root = make_root(singular, kind)
    r = root.times(identity)
    torch.testing.assert_close(r @ r.T, singular, rtol=1e-9, atol=1e-9)
    inverse = root.inverse_transpose_times(identity).T
    expected = torch.linalg.pinv(r) if kind == "pseudo" else torch.linalg.inv(r)
    torch.testing.assert_close(inverse @ r, expected @ r, rtol=1e-6, atol=1e-6)
    assert bool(root.notes) == (kind != "pseudo")


def test_eigen_ladder(monkeypatch):
    _, x = problem(1, 6)
    c = x @ x.T
    real, calls = torch.linalg.eigh, []

    def flaky(matrix):
        calls.append(matrix)
        if len(calls) < 3:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", flaky)
    values, vectors, notes = descending_eigen(c)
    torch.testing.assert_close(vectors * values @ vectors.T, c, rtol=1e-9, atol=1e-9)
    assert "jitter" in notes[0]
    assert bool((values.diff() <= 0).all())
