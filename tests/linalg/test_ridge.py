"""The ridge by cross-validation from sums, against fits and tests on raw tokens."""

from dataclasses import replace

import pytest
import torch

from observed import random
from slimrank.linalg.forms import Form
from slimrank.linalg.regression import Regression
from slimrank.linalg.ridge import RIDGES, cross_validated

SHAPES = [(7, 7), (5, 9), (9, 5)]
COUNT = 40


def tokens(m, n, noise, seed=0):
    """Inputs of very different sizes, a weight, and targets of another weight near it, with noise."""
    x = random(2 * COUNT, n, seed=seed) * torch.logspace(0, -2, n, dtype=torch.float64)
    weight = random(m, n, seed=seed + 1)
    wanted = x @ (weight + 0.3 * random(m, n, seed=seed + 2)).t() + noise * random(2 * COUNT, m, seed=seed + 3)
    return x, wanted, weight


def halves(x, t, **more):
    return tuple(replace(Regression.of(x[i::2], t[i::2]), **more) for i in range(2))


def by_tokens(x, t, weight, form, unit="diagonal"):
    """The best of RIDGES, by fitting and testing on tokens."""
    energies = x.square().sum(dim=0)
    penalty = (energies if unit == "diagonal" else energies.mean().expand_as(energies)).diag()
    errors = []
    for ridge in RIDGES:
        error = 0.0
        for i in range(2):
            xa, xb, lacking = x[i::2], x[1 - i :: 2], (t - x @ weight.t())[i::2]
            damped = xa.t() @ xa + ridge * penalty
            change = torch.linalg.solve(damped, xa.t() @ lacking)
            left = t[1 - i :: 2] - xb @ weight.t() - xb @ change
            error += float((left @ form * left).sum())
        errors.append(error)
    return RIDGES[errors.index(min(errors))]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("noise", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("m, n", SHAPES)
def test_it_is_the_best_by_raw_tokens(m, n, noise, seed):
    x, t, weight = tokens(m, n, noise, seed)
    g = random(m, m, seed=9)
    for form, row in ((torch.eye(m, dtype=torch.float64), Form()), (g @ g.t(), Form(g @ g.t()))):
        for unit in ("diagonal", "identity"):
            found = cross_validated(halves(x, t, row=row), weight, unit)
            assert found == by_tokens(x, t, weight, form, unit)


@pytest.mark.parametrize("noise", [0.1, 2.0])
@pytest.mark.parametrize("m, n", SHAPES)
def test_a_form_seen_through_the_weight_does(m, n, noise):
    x, _, weight = tokens(m, n, 0.0)
    z = x + noise * random(*x.shape, seed=5)
    g = random(m, m, seed=9)
    form = g @ g.t()
    whole = halves(x, z @ weight.t(), row=Form(form))
    seen = tuple(
        replace(half, row=Form(weight.t() @ form @ weight, seen=True), mixed=z[i::2].t() @ x[i::2])
        for i, half in enumerate(whole)
    )
    assert cross_validated(seen, weight) == cross_validated(whole, weight) == by_tokens(x, z @ weight.t(), weight, form)


def test_more_noise_takes_more_ridge():
    chosen = [cross_validated(halves(*tokens(7, 9, noise)[:2]), tokens(7, 9, noise)[2]) for noise in (0, 0.1, 1, 10)]
    assert chosen == sorted(chosen)
    assert chosen[0] == RIDGES[0]
    assert chosen[-1] > 100 * chosen[1]


def test_the_unit_of_inputs_and_the_order_of_halves_do_not_matter():
    x, t, weight = tokens(6, 8, 0.3)
    chosen = cross_validated(halves(x, t), weight)
    assert cross_validated(halves(1000 * x, 1000 * t), weight) == chosen
    assert cross_validated(halves(x, t)[::-1], weight) == chosen


@pytest.mark.parametrize("m, n", SHAPES)
def test_a_shrunk_problem_has_the_damped_solution_in_the_metric_of_the_inputs(m, n):
    x, _, weight = tokens(m, n, 0.0)
    z = x + 0.1 * random(*x.shape, seed=5)
    problem = replace(Regression.of(x, z @ weight.t()), mixed=z.t() @ x)
    shrunk, damped = problem.shrunk(weight, 0.1), problem.towards(weight, 0.1)
    torch.testing.assert_close(shrunk.solution(), damped.solution(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(shrunk.cross, weight @ shrunk.mixed, rtol=1e-8, atol=1e-8)
    assert torch.equal(shrunk.gram, problem.gram)
    same = problem.shrunk(weight, 1e9)
    torch.testing.assert_close(same.solution(), weight, rtol=1e-4, atol=1e-4)
