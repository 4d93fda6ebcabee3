"""Rounding to integers: grids, the nearest, and GPTQ against brute force and plain definitions."""

from itertools import product

import pytest
import torch

from observed import random
from slimrank.linalg.gptq import damped, error, fit_scales, gptq
from slimrank.linalg.regression import Regression
from slimrank.linalg.rounding import grid_of, nearest
from slimrank.linalg.scheme import Scheme

SCHEMES = ["int2-g8", "int3-g4", "int4", "int4-g8-sym", "int8-g8", "int5-sym"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(n, seed=0, count=200):
    """A gram whose channels are correlated and of unequal energy."""
    x = random(count, n, seed=seed) @ (random(n, n, seed=seed + 1) + 2 * torch.eye(n, dtype=torch.float64))
    x *= torch.logspace(-1, 1, n, dtype=torch.float64)
    return x.t() @ x


def total(weight, rounded, gram):
    return float(error(weight, rounded.values(), damped(gram)).sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", SCHEMES)
def test_numbers_lie_on_the_grid(text, dtype):
    scheme, weight = Scheme.parse(text), random(6, 24, seed=3)
    for found in (nearest(weight, scheme, dtype), gptq(weight, inputs(24), scheme, dtype)):
        least, most = scheme.codes
        assert torch.equal(found.codes, found.codes.round())
        assert found.codes.min() >= least
        assert found.codes.max() <= most
        assert torch.equal(found.grid.zero, found.grid.zero.round())
        assert not scheme.symmetric or not found.grid.zero.any()
        assert torch.equal(found.grid.scale.to(dtype).double(), found.grid.scale)
        columns = scheme.columns(24)
        scale, zero = (x.repeat_interleave(columns, 1) for x in (found.grid.scale, found.grid.zero))
        expected = ((found.codes - zero).to(dtype) * scale.to(dtype)).double()
        assert torch.equal(found.values(), expected)


@pytest.mark.parametrize("text", SCHEMES)
def test_the_nearest_is_the_nearest_of_all_points(text):
    scheme, weight = Scheme.parse(text), random(3, 8, seed=4)
    found = nearest(weight, scheme, torch.float64)
    least, most = scheme.codes
    columns = scheme.columns(8)
    for row, column in product(range(3), range(8)):
        scale, zero = (float(x[row, column // columns]) for x in (found.grid.scale, found.grid.zero))
        points = (torch.arange(least, most + 1, dtype=torch.float64) - zero) * scale
        best = float((points - weight[row, column]).abs().min())
        assert abs(float(found.values()[row, column] - weight[row, column])) == pytest.approx(best, abs=1e-12)


def test_the_range_is_shrunk_where_that_lowers_the_error():
    weight = random(5, 64, seed=1) * 0.1
    weight[:, 0] = 3.0
    scheme = Scheme(3)
    plain = (weight.amax(1, keepdim=True) - weight.amin(1, keepdim=True)) / 7
    zero = (-4 - weight.amin(1, keepdim=True) / plain).round()
    rounded = ((weight / plain + zero).round().clamp(-4, 3) - zero) * plain
    found = nearest(weight, scheme, torch.float64).values()
    assert (found - weight).square().sum() < (rounded - weight).square().sum()
    importance = torch.ones(64, dtype=torch.float64)
    importance[0] = 1e4
    kept = grid_of(weight, scheme, torch.float64, importance)
    assert abs(float(kept.values(kept.nearest(weight))[0, 0]) - 3.0) < 0.3


def test_weights_on_the_grid_come_back_exactly():
    scheme = Scheme(4, 8)
    codes = torch.randint(-8, 8, (6, 24), generator=torch.Generator().manual_seed(0)).double()
    codes[:, ::8], codes[:, 1::8] = -8, 7  # the whole range is used
    weight = codes * 0.25
    for found in (nearest(weight, scheme, torch.float32), gptq(weight, inputs(24), scheme, torch.float32)):
        torch.testing.assert_close(found.values(), weight, rtol=1e-6, atol=1e-6)


def test_with_uncorrelated_inputs_it_rounds_to_the_nearest():
    weight, scheme = random(6, 24, seed=5), Scheme(4, 8)
    found = gptq(weight, torch.eye(24, dtype=torch.float64), scheme, torch.float32, sweeps=0)
    assert torch.equal(found.codes, nearest(weight, scheme, torch.float32).codes)


@pytest.mark.parametrize("text", SCHEMES)
def test_it_beats_the_nearest_and_sweeps_help(text):
    scheme, weight, gram = Scheme.parse(text), random(12, 24, seed=7), inputs(24, seed=8)
    plain = total(weight, nearest(weight, scheme, torch.float32), gram)
    errors = [total(weight, gptq(weight, gram, scheme, torch.float32, sweeps), gram) for sweeps in range(4)]
    assert errors[0] < plain
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.999 * errors[0]


def test_it_is_near_the_best_of_all_integers():
    """Two rows of four columns in two bits: every choice of integers on the same grid is tried."""
    scheme, weight, gram = Scheme(2), random(2, 4, seed=11), inputs(4, seed=12)
    found, metric = gptq(weight, gram, scheme, torch.float64), damped(gram)
    choices = torch.tensor(list(product(range(-2, 2), repeat=4)), dtype=torch.float64)
    for row in range(2):
        scale, zero = found.grid.scale[row], found.grid.zero[row]
        best = min(float(error(weight[row : row + 1], (c[None] - zero) * scale, metric)) for c in choices)
        mine = float(error(weight[row : row + 1], found.values()[row : row + 1], metric))
        assert best <= mine <= 1.5 * best


def test_fitted_scales_are_those_of_least_squares():
    scheme, weight, gram = Scheme(4, 8), random(5, 24, seed=13), inputs(24, seed=14)
    found = nearest(weight, scheme, torch.float64)
    fitted = fit_scales(weight, gram, found)
    root = torch.linalg.cholesky(gram)
    parts = (found.codes.unflatten(1, (3, 8)) - found.grid.zero[..., None]).double()
    for row in range(5):
        design = torch.stack([parts[row, g] @ root[8 * g : 8 * g + 8] for g in range(3)], 1)
        best = torch.linalg.lstsq(design, (weight[row] @ root)[:, None]).solution[:, 0]
        torch.testing.assert_close(fitted.grid.scale[row], best, rtol=1e-5, atol=1e-8)
    assert torch.equal(fitted.codes, found.codes)


def test_rows_are_rounded_independently_and_scales_do_not_matter():
    weight, gram, scheme = random(6, 24, seed=15), inputs(24, seed=16), Scheme(3, 8)
    whole = gptq(weight, gram, scheme, torch.float64)
    part = gptq(weight[2:4], 1000 * gram, scheme, torch.float64)
    torch.testing.assert_close(part.values(), whole.values()[2:4], rtol=1e-9, atol=1e-12)


def test_inputs_that_are_dead_or_missing_do_no_harm():
    weight, gram = random(4, 16, seed=17), inputs(16, seed=18)
    gram[3], gram[:, 3] = 0, 0
    for form in (gram, torch.zeros_like(gram)):
        found = gptq(weight, form, Scheme(4, 8), torch.float32).values()
        assert torch.isfinite(found).all()
        assert (found - weight).abs().max() < 1.0
    zero = gptq(torch.zeros(3, 16, dtype=torch.float64), gram, Scheme(4, 8), torch.float32)
    assert not zero.values().any()


def test_groups_must_divide_the_columns():
    with pytest.raises(ValueError, match="groups of 5 do not divide 24 columns"):
        gptq(random(4, 24), inputs(24), Scheme(4, 5), torch.float32)


def test_rounding_the_least_squares_weight_rounds_the_target():
    """What is lost on the target is what least squares loses, and the rounding error of its solution."""
    x = random(200, 16, seed=19)
    problem = Regression.of(x, x @ random(6, 16, seed=20).t() + 0.3 * random(200, 6, seed=21))
    best = problem.solution()
    found = gptq(best, problem.gram, Scheme(4, 8), torch.float32).values()
    expected = problem.loss(best) + float(error(best, found, problem.gram).sum())
    assert problem.loss(found) == pytest.approx(expected, rel=1e-9)
