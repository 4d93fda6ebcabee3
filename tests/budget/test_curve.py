"""Curves: candidates, costs, tails, and what is refused."""

import numpy as np
import pytest
import torch

from observed import random
from slimrank.budget.curves import DENSE, Curve, Limits, candidates, isotonic, spectral_curve, tails
from slimrank.errors import PlanError
from slimrank.layers.forms import PAIR, PIVOT
from slimrank.linalg.forms import Metric
from slimrank.linalg.lowrank import solve

SHAPE = (12, 20)  # pairs are smaller than the weight up to rank 7


def ranks_of(*arguments, **options):
    return candidates("layer", *arguments, **options)[0].tolist()


def test_candidates():
    ranks, costs = candidates("layer", SHAPE)
    assert ranks.tolist() == [*range(1, 8), DENSE]
    assert costs.tolist() == [PAIR.parameters(12, 20, r) for r in range(1, 8)] + [PAIR.parameters(12, 20, "dense")]
    assert ranks_of(SHAPE, 3) == [3, 6, DENSE]
    assert ranks_of(SHAPE, 8) == [DENSE]
    assert ranks_of(SHAPE, 1, Limits(least=3, most=5)) == [3, 4, 5]
    assert ranks_of(SHAPE, 1, Limits(least=6)) == [6, 7, DENSE]
    assert ranks_of(SHAPE, 4, Limits(least=5, most=5)) == [5]
    assert ranks_of(SHAPE, 1, Limits(dense=True)) == [DENSE]


def test_pivots_store_less_up_to_the_full_rank():
    ranks, costs = candidates("layer", SHAPE, form=PIVOT)
    assert ranks.tolist() == [*range(1, 12), DENSE]
    assert costs.tolist() == [r * 32 - r * r for r in range(1, 12)] + [240]
    assert PIVOT.parameters(12, 20, 12) == 240
    assert bool((np.diff(costs) > 0).all())


@pytest.mark.parametrize("limits", [Limits(least=9, most=11), Limits(least=8, most=8)])
def test_limits_that_leave_no_rank(limits):
    with pytest.raises(PlanError, match=r"no multiple of 1 is a rank of 'layer'.*\n?.*1\.\.7, or stay dense"):
        candidates("layer", SHAPE, 1, limits)


@pytest.mark.parametrize("least, most", [(0, 5), (0, 0), (1, 0), (-1, None)])
def test_there_is_no_rank_zero(least, most):
    with pytest.raises(PlanError, match="the smallest rank is 1"):
        Limits(least, most)


def test_bounds_with_nothing_between():
    with pytest.raises(PlanError, match="ranks from 5 to 3 are asked for; there are none"):
        Limits(5, 3)
    assert Limits.all_of([Limits(2), Limits(3, 9), Limits(1, 5)]) == Limits(3, 5)
    with pytest.raises(PlanError, match="must be equal"):
        Limits.all_of([Limits(2, 4), Limits(5, 9)])


@pytest.mark.parametrize("shape", [(10, 14), (14, 10)])
def test_tails_are_errors_on_the_data(shape):
    """T(r) = || (W - W'_r) X ||_F^2 on the calibration data, and T(0) = || W X ||_F^2."""
    weight, x = random(*shape, seed=1), random(shape[1], 50, seed=2)
    spectrum = solve(weight, Metric.of(column=x @ x.T))
    tail = tails(spectrum.values.numpy(), spectrum.beyond, shape, "layer")
    assert tail[0] == pytest.approx(float((weight @ x).square().sum()))
    for rank in (1, 3, 9):
        a, b = spectrum.factors(weight, rank)
        assert tail[rank] == pytest.approx(float(((weight - b @ a) @ x).square().sum()))
    curve = spectral_curve("layer", tail, *candidates("layer", shape), weights=2.0)
    assert curve.errors[0] == pytest.approx(2 * tail[1])
    assert curve.errors[-1] == 0
    assert tails(spectrum.values.numpy(), 0.0, shape, "layer", power=1)[0] == pytest.approx(
        spectrum.values.sum().item()
    )


def test_a_part_of_a_spectrum_with_the_energy_of_the_rest():
    values = torch.arange(8, 0, -1, dtype=torch.float64).numpy()
    rest = float((values[5:] ** 2).sum())
    short, full = tails(values[:5], rest, (8, 9), "layer"), tails(values, 0.0, (8, 9), "layer")
    assert np.allclose(short, full[:6])
    curve = spectral_curve("layer", short, *candidates("layer", (8, 9)))
    assert curve.ranks.tolist() == [1, 2, 3, 4, DENSE]


@pytest.mark.parametrize(
    "values, beyond, message",
    [
        ([3.0, 2.0], 0.0, "holds 2 of 3 values"),
        ([3.0, np.nan, 1.0], 0.0, "is not finite"),
        ([3.0, np.inf, 1.0], 0.0, "is not finite"),
        ([3.0, 2.0, -1.0], 0.0, "is not finite"),
    ],
)
def test_spectra_that_are_refused(values, beyond, message):
    with pytest.raises(PlanError, match=f"the spectrum of 'q' {message}"):
        tails(np.array(values), beyond, (3, 4), "q")


@pytest.mark.parametrize(
    "costs, errors, message",
    [
        ([1, 2, 3], [3.0, 4.0, 1.0], "rises from rank 1 to 2"),
        ([1, 2, 3], [3.0, np.nan, 1.0], "at rank 2 is NaN"),
        ([1, 2, 3], [np.inf, 2.0, 1.0], "at rank 1 is NaN, inf"),
        ([1, 2, 3], [3.0, 2.0, -1.0], "at rank dense is NaN, infinite or negative"),
        ([1, 1, 3], [3.0, 2.0, 1.0], "costs of 'q' do not increase"),
        ([1, 2], [3.0, 2.0], "lists of other lengths"),
    ],
)
def test_curves_that_are_refused(costs, errors, message):
    with pytest.raises(PlanError, match=message) as raised:
        Curve("q", np.array([1, 2, DENSE]), np.array(costs), np.array(errors))
    assert "'q'" in str(raised.value)


def test_index_and_rank():
    curve = Curve("q", np.array([2, 4, DENSE]), np.array([10, 20, 50]), np.array([3.0, 2.0, 0.0]))
    assert [curve.rank(i) for i in range(3)] == [2, 4, "dense"]
    assert [curve.index(r) for r in (2, 4, "dense")] == [0, 1, 2]
    assert [curve.largest_within(c) for c in (9, 10, 19, 20, 49, 50, 99)] == [-1, 0, 0, 1, 1, 2, 2]
    with pytest.raises(PlanError, match="rank 3 is not a candidate of 'q'"):
        curve.index(3)


def test_isotonic_is_the_nearest_non_increasing_sequence():
    rng = np.random.default_rng(0)
    for _ in range(20):
        noisy = np.linspace(3, 0, 8) + rng.normal(size=8)
        found = isotonic(noisy)
        assert bool((np.diff(found) <= 1e-12).all())
        least = ((noisy - found) ** 2).sum()
        for _ in range(200):
            other = np.sort(found + 0.3 * rng.normal(size=8))[::-1]
            assert ((noisy - other) ** 2).sum() >= least - 1e-12
    assert isotonic(np.array([3.0, 2.0, 1.0])).tolist() == [3.0, 2.0, 1.0]
    assert isotonic(np.array([1.0, 3.0])).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (1, 4), (6, 6)])
@pytest.mark.parametrize("form", [PAIR, PIVOT], ids=lambda c: c.name)
def test_the_largest_rank_within_a_size(form, shape):
    for parameters in range(-1, 2 * shape[0] * shape[1]):
        fitting = [r for r in range(min(shape) + 1) if form.parameters(*shape, r) <= parameters]
        assert form.within(*shape, parameters) == max(fitting, default=-1)
