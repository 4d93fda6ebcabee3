"""The budget solvers against brute force, their certificates, and what must not change a plan."""

import itertools
import time

import numpy as np
import pytest

from slimrank.budget.curves import Curve, candidates, spectral_curve, tails
from slimrank.budget.exact import solve_exactly
from slimrank.budget.hulls import Table, hull_steps
from slimrank.budget.knapsack import solve, trade_off
from slimrank.errors import BudgetError

SEEDS = range(40)


def small(seed, curves=4, candidates=5):
    """Curves of any shape, and a budget between the smallest and the largest plan."""
    rng = np.random.default_rng(seed)
    made = [
        Curve(
            f"layer {i}",
            np.arange(1, candidates + 1),
            np.cumsum(rng.integers(1, 9, candidates)),
            np.sort(rng.random(candidates))[::-1].copy(),
        )
        for i in range(curves)
    ]
    least, most = sum(int(c.costs[0]) for c in made), sum(int(c.costs[-1]) for c in made)
    return made, int(rng.integers(least, most + 1))


def spectral(blocks=4, multiple=1, seed=0, shapes=((96, 96), (32, 96), (192, 96), (96, 192))):
    """Curves of power-law spectra, named block.layer."""
    rng = np.random.default_rng(seed)
    made = []
    for block, (place, (m, n)) in itertools.product(range(blocks), enumerate(shapes)):
        values = np.arange(1, min(m, n) + 1) ** -rng.uniform(0.4, 0.9) * np.exp(rng.normal())
        path = f"{block}.{place}"
        made.append(spectral_curve(path, tails(values, 0.0, (m, n), path), *candidates(path, (m, n), multiple)))
    return made


def whole(curves):
    return sum(int(c.costs[-1]) for c in curves)


def plans(curves, allowed=lambda picks: True):
    for picks in itertools.product(*(range(len(c)) for c in curves)):
        if allowed(picks):
            cost = sum(int(c.costs[i]) for c, i in zip(curves, picks, strict=True))
            yield cost, sum(float(c.errors[i]) for c, i in zip(curves, picks, strict=True))


def best(curves, budget, allowed=lambda picks: True):
    return min(error for cost, error in plans(curves, allowed) if cost <= budget)


def check(solution, curves, budget):
    """What the solution says of itself, and the budget contract: nothing could still grow by one candidate."""
    known = {c.path: c for c in curves}
    assert list(solution.ranks) == list(known)
    picks = {path: known[path].index(rank) for path, rank in solution.ranks.items()}
    assert solution.cost == sum(int(known[p].costs[i]) for p, i in picks.items()) <= budget
    assert solution.error == pytest.approx(sum(float(known[p].errors[i]) for p, i in picks.items()))
    assert solution.bound <= solution.error
    for path, i in picks.items():
        if i + 1 < len(known[path]) and known[path].errors[i + 1] < known[path].errors[i]:
            assert known[path].costs[i + 1] - known[path].costs[i] > budget - solution.cost


@pytest.mark.parametrize("seed", SEEDS)
def test_exact_is_the_best_of_all_plans(seed):
    curves, budget = small(seed)
    solution = solve_exactly(curves, budget)
    assert solution.error == pytest.approx(best(curves, budget), rel=1e-9)
    assert solution.gap < 1e-6
    check(solve(curves, budget), curves, budget)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_bound_and_the_plan_are_on_both_sides_of_the_best(seed):
    curves, budget = small(seed)
    solution, least = solve(curves, budget), best(curves, budget)
    assert solution.bound <= least * (1 + 1e-9)
    assert solution.error >= least * (1 - 1e-9)


def test_the_plan_is_mostly_the_best():
    misses = [solve(*problem).error > best(*problem) * (1 + 1e-9) for problem in map(small, range(100))]
    assert sum(misses) <= 5


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.6, 0.8, 0.9, 0.97])
def test_spectra_of_layers(keep, multiple):
    curves = spectral(blocks=8, multiple=multiple)
    budget = int(keep * whole(curves))
    solution, exact = solve(curves, budget), solve_exactly(curves, budget)
    check(solution, curves, budget)
    assert exact.error <= solution.error
    assert solution.error <= exact.error * 1.003
    assert solution.bound <= exact.error * (1 + 1e-9)
    assert all(r == "dense" or r % multiple == 0 for r in solution.ranks.values())


@pytest.mark.parametrize("solver", [solve, solve_exactly])
@pytest.mark.parametrize("factor", [1e10, 1e15, 1e300])
def test_an_error_that_is_huge_hides_no_other(solver, factor):
    """The bound as all first errors less all gains lost the others in rounding, and the exact solver stopped."""
    curves = spectral(blocks=2)
    budget = int(0.6 * whole(curves))
    errors = curves[0].errors.copy()
    errors[0] *= factor
    curves[0] = Curve(curves[0].path, curves[0].ranks, curves[0].costs, errors)
    solution, known = solver(curves, budget), solver([curves[0].choose(errors < errors[0]), *curves[1:]], budget)
    check(solution, curves, budget)
    assert solution.ranks == known.ranks
    assert solution.bound == pytest.approx(known.bound, rel=1e-6)


LLAMA = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
EXPERT = [(768, 2048), (768, 2048), (2048, 768)]


@pytest.mark.parametrize(
    "shapes, seconds",
    [
        (LLAMA * 32, 0.3),
        ([(2 * m, 2 * n) for m, n in LLAMA] * 80, 1.0),
        (EXPERT * 4000, 10.0),
    ],
    ids=["8b", "70b", "experts"],
)
def test_large_models_are_solved_in_time(shapes, seconds):
    """Ranks in steps of 8. Three times the seconds that are asked for, of one thread: the machine may be slow."""
    rng, known, curves = np.random.default_rng(0), {s: candidates("layer", s, 8) for s in set(shapes)}, []
    for i, (m, n) in enumerate(shapes):
        values = np.arange(1, min(m, n) + 1) ** -rng.uniform(0.4, 0.9) * np.exp(rng.normal())
        curves.append(spectral_curve(f"{i:05d}", tails(values, 0.0, (m, n), "layer"), *known[m, n]))
    start = time.process_time()
    solution = solve(curves, int(0.8 * whole(curves)))
    assert time.process_time() - start < 3 * seconds
    assert solution.gap < 5e-4


def test_everything_is_dense_where_the_budget_is_the_whole():
    curves = spectral()
    for solver in (solve, solve_exactly):
        assert set(solver(curves, whole(curves)).ranks.values()) == {"dense"}


@pytest.mark.parametrize("solver", [solve, solve_exactly])
def test_units_and_order_change_nothing(solver):
    curves = spectral(seed=3)
    budget = int(0.7 * whole(curves))
    ranks = solver(curves, budget).ranks
    assert solver([c.scaled(1e7) for c in curves], budget).ranks == ranks
    assert solver([c.scaled(2.0**-20) for c in curves], budget).ranks == ranks
    assert solver(curves[::-1], budget).ranks == ranks
    assert solver(curves, budget).ranks == ranks


@pytest.mark.parametrize("seed", range(10))
def test_a_layer_that_matters_more_gets_no_lower_rank(seed):
    curves = spectral(blocks=2, seed=seed)
    budget = int(0.6 * whole(curves))
    sizes = []
    for factor in (0.25, 1, 4, 16):
        changed = [curves[0].scaled(factor), *curves[1:]]
        ranks = solve_exactly(changed, budget).ranks
        sizes.append(int(curves[0].costs[curves[0].index(ranks[curves[0].path])]))
    assert sizes == sorted(sizes)


def test_dominated_candidates_only_take_what_nothing_else_can():
    """From 35 to 39 there is room for the step to 20, and for none that saves an error."""
    useless = Curve("a", np.array([1, 2, 3]), np.array([10, 20, 30]), np.array([5.0, 5.0, 1.0]))
    other = Curve("b", np.array([1, 2]), np.array([10, 15]), np.array([3.0, 2.0]))
    for budget in range(20, 46):
        solution = solve_exactly([useless, other], budget)
        assert (solution.ranks["a"] == 2) == (35 <= budget < 40)
        assert solution.error == best([useless, other], budget)


def test_the_hull_is_the_lower_hull():
    rng = np.random.default_rng(0)
    curves = [
        Curve(str(i), np.arange(n), np.cumsum(rng.integers(1, 20, n)), np.sort(rng.random(n))[::-1].copy())
        for i, n in enumerate(rng.integers(1, 30, 60))
    ]
    steps = hull_steps(Table.of(curves))
    assert bool((np.diff(steps.gain / steps.cost) <= 1e-15).all())
    for row, curve in enumerate(curves):
        corners = [0, *steps.pick[steps.row == row].tolist()]
        on_hull = np.interp(curve.costs, curve.costs[corners], curve.errors[corners])
        assert bool((curve.errors >= on_hull - 1e-12).all())
        slopes = np.diff(curve.errors[corners]) / np.diff(curve.costs[corners])
        assert bool((np.diff(slopes) > 0).all())


def test_the_trade_off_is_the_best_plan_at_every_size():
    curves, _ = small(1, candidates=4)
    path = trade_off(curves)
    assert bool((np.diff(path.costs) > 0).all())
    assert bool((np.diff(path.errors) < 0).all())
    everything = sorted(plans(curves))
    for cost, error in zip(path.costs, path.errors, strict=True):
        assert error == pytest.approx(min(e for c, e in everything if c <= cost))


def test_a_budget_below_the_smallest_plan_says_what_would_do():
    curves = spectral()
    least = sum(int(c.costs[0]) for c in curves)
    for solver in (solve, solve_exactly):
        with pytest.raises(BudgetError, match=r"smallest ranks allowed store .* '0\.\d'") as raised:
            solver(curves, least - 1)
        assert f"a budget of at least {least} parameters" in str(raised.value)
        assert solver(curves, least).cost == least
