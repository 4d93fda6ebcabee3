import pytest
import torch

from slimrank.linalg.tangent import tangent_step


def problem(m, n, r, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    x = draw(n, 3 * n)
    return draw(r, n), draw(m, r), draw(m, n), x @ x.t()


SHAPES = [(6, 9, 3), (9, 6, 4), (7, 7, 1)]


@pytest.mark.parametrize("m, n, r", SHAPES)
def test_the_step_is_the_best_of_the_tangent_space(m, n, r):
    """Against least squares over all dA and dB at once: minimise <S, D> + 1/2 tr(D Q D^T)."""
    a, b, s, q = problem(m, n, r)
    basis = []
    for i in range(r * n):
        d = torch.zeros(r * n, dtype=torch.float64)
        d[i] = 1
        basis.append(b @ d.view(r, n))
    for i in range(m * r):
        d = torch.zeros(m * r, dtype=torch.float64)
        d[i] = 1
        basis.append(d.view(m, r) @ a)
    space = torch.stack([d.flatten() for d in basis], 1)
    quadratic = space.t() @ torch.kron(torch.eye(m, dtype=torch.float64), q) @ space
    best = -(space @ (torch.linalg.pinv(quadratic, rtol=1e-12) @ (space.t() @ s.flatten()))).view(m, n)
    step = tangent_step(a, b, s, q)
    d = step.B @ a + b @ step.A
    torch.testing.assert_close(d, best, rtol=1e-8, atol=1e-8)
    assert step.decrease == pytest.approx(-float((s * d).sum()))
    assert step.decrease == pytest.approx(float(torch.trace(d @ q @ d.t())))


@pytest.mark.parametrize("m, n, r", SHAPES)
def test_the_step_does_not_depend_on_the_gauge(m, n, r):
    a, b, s, q = problem(m, n, r)
    g = torch.randn(r, r, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 3 * torch.eye(r)
    one, other = tangent_step(a, b, s, q), tangent_step(torch.linalg.solve(g, a), b @ g, s, q)
    torch.testing.assert_close(
        one.B @ a + b @ one.A, other.B @ torch.linalg.solve(g, a) + b @ g @ other.A, rtol=1e-8, atol=1e-8
    )
    assert one.decrease == pytest.approx(other.decrease)


@pytest.mark.parametrize("m, n", [(5, 8), (8, 5)])
def test_at_full_rank_nothing_is_lost(m, n):
    a, b, s, q = problem(m, n, min(m, n))
    step = tangent_step(a, b, s, q)
    torch.testing.assert_close(step.B @ a + b @ step.A, -s @ torch.linalg.inv(q), rtol=1e-8, atol=1e-8)


def test_a_factor_that_lacks_rank_is_stepped_from():
    a, b, s, q = problem(6, 9, 3)
    b[:, 2] = b[:, 1]
    step = tangent_step(a, b, s, q)
    assert bool(torch.isfinite(step.A).all() and torch.isfinite(step.B).all())
    assert step.decrease > 0
