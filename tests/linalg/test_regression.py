"""Least squares against a target, by sums, against the same by raw tokens."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from observed import random
from slimrank.linalg.forms import Form, Metric
from slimrank.linalg.lowrank import solve
from slimrank.linalg.regression import Regression, alternate, best_a, best_b, reduced_rank, spd_solve

SHAPES = [(7, 7), (5, 9), (9, 5)]


def tokens(m, n, count=80, seed=0):
    """Inputs x', and targets W x of other inputs x near them."""
    x = random(count, n, seed=seed) @ (random(n, n, seed=seed + 1) / n**0.5 + torch.eye(n, dtype=torch.float64))
    weight = random(m, n, seed=seed + 2)
    return x, (x + 0.5 * random(count, n, seed=seed + 3)) @ weight.t(), weight


def close(found, expected, tolerance=1e-8):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def raw_loss(x, t, w):
    return float((t - x @ w.t()).square().sum())


def start(weight, rank):
    return solve(weight).factors(weight, rank)


def product(spectrum, weight, rank):
    a, b = spectrum.factors(weight, rank)
    return b @ a


@pytest.mark.parametrize("m, n", SHAPES)
def test_loss_is_that_of_raw_tokens(m, n):
    x, t, weight = tokens(m, n)
    problem = Regression.of(x, t)
    for w in (weight, torch.zeros_like(weight), random(m, n, seed=9), problem.solution()):
        assert problem.loss(w) == pytest.approx(raw_loss(x, t, w), rel=1e-10)


@pytest.mark.parametrize("m, n", SHAPES)
def test_solution_is_least_squares_on_raw_tokens(m, n):
    x, t, _ = tokens(m, n)
    problem = Regression.of(x, t)
    found = problem.solution()
    close(found, torch.linalg.lstsq(x, t).solution.t())
    residual = t - x @ found.t()
    assert float((residual.t() @ x).abs().max()) < 1e-9 * float(problem.cross.abs().max())


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("m, n", SHAPES)
def test_best_b_is_least_squares_on_the_features(m, n, rank):
    x, t, weight = tokens(m, n)
    problem = Regression.of(x, t)
    a, _ = start(weight, rank)
    b = best_b(problem, a)
    close(b, torch.linalg.lstsq(x @ a.t(), t).solution.t())
    residual = t - x @ (b @ a).t()
    assert float((residual.t() @ x @ a.t()).abs().max()) < 1e-9 * float(problem.cross.abs().max())


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("m, n", SHAPES)
def test_best_a_is_stationary_and_no_neighbour_is_better(m, n, rank):
    x, t, weight = tokens(m, n)
    problem = Regression.of(x, t)
    _, b = start(weight, rank)
    a = best_a(b, problem.solution())
    gradient = b.t() @ (b @ a @ problem.gram - problem.cross)
    assert float(gradient.abs().max()) < 1e-9 * float(problem.cross.abs().max())
    for seed in range(10):
        assert problem.loss(b @ (a + 1e-2 * random(rank, n, seed=seed))) > problem.loss(b @ a)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("m, n", SHAPES)
def test_regression_is_no_worse_than_an_update_and_that_than_the_start(m, n, rank):
    x, t, weight = tokens(m, n)
    problem = Regression.of(x, t)
    a, b = start(weight, rank)
    spectrum, best = reduced_rank(problem)
    full, updated, before = (
        problem.loss(w) for w in (product(spectrum, best, rank), best_b(problem, a) @ a, b @ a)
    )  # fmt: skip
    assert full < updated < before


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("m, n", SHAPES)
def test_loss_of_reduced_rank_regression(m, n, rows):
    """That of the unbounded solution, plus the tail of the spectrum."""
    x, t, _ = tokens(m, n)
    root = random(m, m, seed=4) if rows else torch.eye(m, dtype=torch.float64)  # G = L L^T
    spectrum, best = reduced_rank(replace(Regression.of(x, t), row=Form(root @ root.t() if rows else None)))
    unbounded = raw_loss(x @ torch.eye(n, dtype=torch.float64), t @ root, root.t() @ best)
    for rank in range(1, min(m, n) + 1):
        loss = float(((t - x @ product(spectrum, best, rank).t()) @ root).square().sum())
        assert loss == pytest.approx(unbounded + spectrum.tail(rank), rel=1e-8)


@pytest.mark.parametrize("ridge", [0.0, 0.1])
@pytest.mark.parametrize("m, n", [(12, 4), (9, 5)])
def test_a_form_seen_through_the_weight_does_for_targets_that_it_makes(m, n, ridge):
    """G whole, and as W^T G W: the same factors, also where the problem is damped towards W."""
    x, _, weight = tokens(m, n)
    z = x + 0.5 * random(80, n, seed=3)
    g = random(m, m, seed=4)
    g = g @ g.t() + torch.eye(m, dtype=torch.float64)
    whole = replace(Regression.of(x, z @ weight.t()), row=Form(g), mixed=z.t() @ x).towards(weight, ridge)
    seen = replace(whole, row=Form(weight.t() @ g @ weight, seen=True))
    spectrum, best = reduced_rank(seen)
    for rank in range(1, min(m, n) + 1):
        expected = solve(best, Metric(Form(g), Form(whole.gram)), side="in")
        close(product(spectrum, best, rank), product(expected, best, rank), 1e-7)


def test_a_form_seen_through_another_weight_is_refused():
    x, t, weight = tokens(9, 5)
    problem = replace(Regression.of(x, t), row=Form(weight.t() @ weight, seen=True))
    with pytest.raises(ValueError, match="seen through a weight"):
        reduced_rank(problem)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("m, n", SHAPES)
def test_no_alternating_solution_is_better(m, n, rows):
    x, t, _ = tokens(m, n)
    g = (random(m, m, seed=4) if rows else torch.eye(m, dtype=torch.float64)) + torch.eye(m, dtype=torch.float64)
    g = g @ g.t()
    spectrum, best = reduced_rank(replace(Regression.of(x, t), row=Form(g)))
    c, d = x.t() @ x, t.t() @ x

    def loss(w):
        e = t - x @ w.t()
        return float((e @ g * e).sum())

    mine = loss(product(spectrum, best, 2))
    a = random(30, 2, n, seed=5)
    for _ in range(150):
        b = torch.linalg.qr(torch.linalg.solve(a @ c @ a.mT, a @ d.t()).mT).Q
        a = torch.linalg.solve(b.mT @ g @ b, b.mT @ g @ d @ torch.linalg.inv(c))
    losses = [loss(w) for w in b @ a]
    assert min(losses) >= mine * (1 - 1e-9)
    assert min(losses) <= mine * 1.001


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("m, n", SHAPES)
def test_with_the_layers_own_outputs_it_is_the_weighted_problem(m, n, rows):
    x, _, weight = tokens(m, n)
    g = random(m, m, seed=4)
    row = Form(g @ g.t() + torch.eye(m, dtype=torch.float64)) if rows else Form()
    spectrum, best = reduced_rank(replace(Regression.of(x, x @ weight.t()), row=row))
    close(best, weight)
    expected = solve(weight, Metric(row, Form(x.t() @ x)))
    for rank in range(1, min(m, n) + 1):
        close(product(spectrum, best, rank), product(expected, weight, rank), 1e-7)
        assert spectrum.tail(rank) == pytest.approx(expected.tail(rank), rel=1e-7, abs=1e-9 * expected.tail(0))


# alternating ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m, n", SHAPES)
def test_every_half_step_lowers_the_loss(m, n):
    x, t, weight = tokens(m, n)
    problem = Regression.of(x, t)
    best = problem.solution()
    a, b = start(weight, 2)
    losses = [problem.loss(b @ a)]
    for _ in range(10):
        b = best_b(problem, a)
        losses.append(problem.loss(b @ a))
        a = best_a(b, best)
        losses.append(problem.loss(b @ a))
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(losses))
    assert losses[4] < losses[2] < losses[0]


@pytest.mark.parametrize("m, n", SHAPES)
def test_alternating_is_rounds_of_these_half_steps(m, n):
    x, t, weight = tokens(m, n)
    problem = Regression.of(x, t)
    a, _ = start(weight, 2)
    found_a, found_b = alternate(problem, a, 3)
    for _ in range(3):
        a = best_a(best_b(problem, a), problem.solution())
    close(found_a, a)
    close(found_b, best_b(problem, a))


@pytest.mark.parametrize("m, n", SHAPES)
def test_alternating_does_nothing_at_the_optimum(m, n):
    x, t, _ = tokens(m, n)
    problem = Regression.of(x, t)
    spectrum, best = reduced_rank(problem)
    a, b = spectrum.factors(best, 3)
    new_a, new_b = alternate(problem, a, 4)
    close(new_b @ new_a, b @ a)


@pytest.mark.parametrize("m, n", SHAPES)
def test_alternating_converges_to_reduced_rank_regression(m, n):
    x, t, weight = tokens(m, n)
    problem = Regression.of(x, t)
    spectrum, best = reduced_rank(problem)
    expected = product(spectrum, best, 2)
    a, _ = start(weight, 2)
    gaps = []
    for iterations in (1, 5, 400):
        new_a, new_b = alternate(problem, a, iterations)
        gaps.append(float((new_b @ new_a - expected).norm()))
    assert gaps[2] < 1e-8 * float(expected.norm())
    assert gaps[2] < gaps[1] < gaps[0]


@pytest.mark.parametrize("m, n", SHAPES)
def test_a_round_is_a_step_of_subspace_iteration(m, n):
    """The row space of A R is multiplied by R^T W_ls^T W_ls R."""
    x, t, weight = tokens(m, n)
    problem = Regression.of(x, t)
    root = torch.linalg.cholesky(problem.gram)
    whitened = problem.solution() @ root
    a, _ = start(weight, 2)
    stepped = torch.linalg.qr(((a @ root) @ whitened.t() @ whitened).t()).Q
    found = torch.linalg.qr((alternate(problem, a, 1)[0] @ root).t()).Q
    close(found @ found.t(), stepped @ stepped.t())
    before = torch.linalg.qr((a @ root).t()).Q
    assert float((found @ found.t() - before @ before.t()).norm()) > 1e-2


# casting, damping, singular problems ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("m, n", [(16, 16), (12, 24), (24, 12)])
def test_a_refit_after_casting_makes_up_for_rounding(m, n, seed):
    x, _, weight = tokens(m, n, count=200, seed=10 * seed)
    problem = Regression.of(x, x @ weight.t())
    a, b = solve(weight, Metric.of(column=problem.gram)).factors(weight, 8)
    cast_a = a.bfloat16()
    refit = best_b(problem, cast_a)
    assert refit.dtype == torch.float64
    exact, both = problem.loss(b @ a), problem.loss(b.bfloat16().double() @ cast_a.double())
    assert exact <= problem.loss(refit @ cast_a.double()) < problem.loss(b @ cast_a.double())
    assert exact < problem.loss(refit.bfloat16().double() @ cast_a.double()) <= both


@pytest.mark.parametrize("unit", ["diagonal", "identity"])
@pytest.mark.parametrize("alpha", [1e-3, 0.5])
@pytest.mark.parametrize("m, n", SHAPES)
def test_damping_is_inputs_of_single_channels_that_ask_for_the_weight(m, n, alpha, unit):
    x, t, weight = tokens(m, n)
    energies = x.square().sum(dim=0)
    channels = (alpha * (energies if unit == "diagonal" else energies.mean().expand(n))).sqrt().diag()
    more_x, more_t = torch.cat([x, channels]), torch.cat([t, channels @ weight.t()])
    problem = Regression.of(x, t)
    before = problem.gram.clone(), problem.cross.clone()
    damped = problem.towards(weight, alpha, unit)
    close(damped.gram, more_x.t() @ more_x)
    close(damped.cross, more_t.t() @ more_x)
    assert damped.energy == pytest.approx(float(more_t.square().sum()))
    close(damped.solution(), torch.linalg.lstsq(more_x, more_t).solution.t())
    for w in (weight, random(m, n, seed=9)):
        assert damped.loss(w) == pytest.approx(raw_loss(more_x, more_t, w))
    assert torch.equal(problem.gram, before[0])
    assert torch.equal(problem.cross, before[1])


@pytest.mark.parametrize("scale", [1e-3, 1e5])
@pytest.mark.parametrize("m, n", SHAPES)
def test_a_ridge_does_not_depend_on_the_scale_of_a_channel(m, n, scale):
    x, t, weight = tokens(m, n)
    scales = torch.ones(n, dtype=torch.float64)
    scales[1] = scale
    expected, best = reduced_rank(Regression.of(x, t).towards(weight, 0.1))
    found, scaled = reduced_rank(Regression.of(x * scales, t).towards(weight / scales, 0.1))
    close(scaled * scales, best, 1e-7)
    close(product(found, scaled, 3) * scales, product(expected, best, 3), 1e-7)


@pytest.mark.parametrize("m, n", SHAPES)
def test_strong_damping_keeps_the_weight(m, n):
    x, t, weight = tokens(m, n)
    close(Regression.of(x, t).towards(weight, 1e9).solution(), weight, 1e-6)


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("m, n", SHAPES)
def test_fewer_tokens_than_channels(m, n, count):
    x, t, weight = tokens(m, n, count=count)
    problem = Regression.of(x, t)
    best = problem.solution()
    a, _ = start(weight, 4)
    new_a, new_b = alternate(problem, a, 2)
    spectrum, _ = reduced_rank(problem)
    for found in (best, best_b(problem, a) @ a, new_b @ new_a, product(spectrum, best, 4)):
        assert bool(torch.isfinite(found).all())
        assert problem.loss(found) < 1e-7 * (1 + problem.energy)  # so few tokens can all be met
    torch.testing.assert_close(best, (torch.linalg.pinv(x) @ t).t() if count else torch.zeros_like(weight))


def test_an_input_that_repeats_another():
    x, t, _ = tokens(6, 8)
    x[:, 3] = x[:, 2]
    problem = Regression.of(x, t)
    found = problem.solution()
    close(found, (torch.linalg.pinv(x) @ t).t(), 1e-6)
    torch.testing.assert_close(found[:, 2], found[:, 3], rtol=1e-6, atol=1e-6)  # of least norm


@pytest.mark.parametrize("m, n", SHAPES)
def test_one_channel_3000_times_the_others(m, n):
    x, t, _ = tokens(m, n)
    x[:, 1] *= 3000
    problem = Regression.of(x, t)
    expected = torch.linalg.lstsq(x, t).solution.t()
    assert raw_loss(x, t, problem.solution()) == pytest.approx(raw_loss(x, t, expected), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_spd_solve_is_the_pseudo_inverse(rank):
    root, right = random(5, rank, seed=1), random(5, 4, seed=2)
    matrix = root @ root.t()
    close(spd_solve(matrix, right), torch.linalg.pinv(matrix, hermitian=True, rtol=1e-10) @ right, 1e-6)
    assert torch.equal(spd_solve(torch.zeros(5, 5, dtype=torch.float64), right), torch.zeros_like(right))


@pytest.mark.parametrize("flaw", ["dead", "repeated"])
def test_where_a_form_is_singular_the_scale_of_a_channel_does_not_matter_either(flaw):
    rows = random(100, 30, seed=1) * torch.logspace(0, 7, 30, dtype=torch.float64)
    expected = random(30, 2, seed=2)
    if flaw == "dead":
        rows[:, 3], expected[3] = 0, 0
    else:
        rows[:, 4], expected[4] = rows[:, 5], expected[5]
    matrix = rows.t() @ rows
    torch.testing.assert_close(spd_solve(matrix, matrix @ expected), expected, rtol=1e-6, atol=1e-6)
