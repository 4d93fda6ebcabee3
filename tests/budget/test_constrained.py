"""Side constraints by block: kept, against brute force, and refused where they cannot be met."""

import re
from dataclasses import replace

import numpy as np
import pytest
from test_knapsack import plans, small, spectral, whole

from slimrank.budget.constrained import solve_constrained
from slimrank.budget.constrained_exact import solve_constrained_exactly
from slimrank.budget.constraints import Constraints
from slimrank.budget.curves import Curve
from slimrank.budget.exact import solve_exactly
from slimrank.errors import BudgetError


def constraints(curves, **kept):
    blocks = {c.path: int(c.path.split(".")[0]) for c in curves}
    return Constraints(blocks, {c.path: int(c.costs[-1]) for c in curves}, **kept)


def fractions(solution, curves):
    """What each block keeps."""
    kept, total = {}, {}
    for curve in curves:
        block = int(curve.path.split(".")[0])
        pick = curve.index(solution.ranks[curve.path])
        kept[block] = kept.get(block, 0) + int(curve.costs[pick])
        total[block] = total.get(block, 0) + int(curve.costs[-1])
    return [kept[b] / total[b] for b in sorted(kept)]


@pytest.mark.parametrize(
    "kept", [{"monotone": True}, {"floor": 0.55}, {"cap": 0.75}, {"monotone": True, "floor": 0.5, "cap": 0.8}], ids=str
)
@pytest.mark.parametrize("seed", range(3))
def test_side_constraints_are_kept(kept, seed):
    curves = spectral(blocks=6, multiple=2, seed=seed)
    budget = int(0.65 * whole(curves))
    solution = solve_constrained(curves, budget, constraints(curves, **kept))
    found = fractions(solution, curves)
    assert solution.cost <= budget
    assert min(found) >= kept.get("floor", 0) - 1e-12
    assert max(found) <= kept.get("cap", 1) + 1e-12
    if kept.get("monotone"):
        assert found == sorted(found, reverse=True)
    assert solution.bound <= solution.error
    assert solution.error >= solve_exactly(curves, budget).error * (1 - 1e-9)
    assert solution.gap < 0.2


def test_constraints_against_all_plans():
    found = 0
    for seed in range(20):
        curves, budget = small(seed, curves=4, candidates=4)
        curves = [Curve(f"{i // 2}.{i % 2}", c.ranks, c.costs, c.errors) for i, c in enumerate(curves)]
        limits = constraints(curves, monotone=True)

        def falls(picks, curves=curves):
            ratio = [
                sum(int(c.costs[picks[2 * b + i]]) for i, c in enumerate(curves[2 * b : 2 * b + 2]))
                / whole(curves[2 * b : 2 * b + 2])
                for b in range(2)
            ]
            return ratio[0] >= ratio[1]

        feasible = [error for cost, error in plans(curves, falls) if cost <= budget]
        if feasible:
            found += 1
            solution = solve_constrained(curves, budget, limits)
            assert solution.bound <= min(feasible) * (1 + 1e-9)
            assert min(feasible) * (1 - 1e-9) <= solution.error <= min(feasible) * 1.25
            exact = solve_constrained_exactly(curves, budget, limits)
            assert exact.error == pytest.approx(min(feasible), rel=1e-9)
            assert exact.gap < 1e-6
    assert found > 10


@pytest.mark.parametrize("kept", [{"monotone": True}, {"floor": 0.5, "cap": 0.8}], ids=str)
def test_the_exact_solver_is_no_worse_and_says_how_near_it_came(kept):
    curves = spectral(blocks=4, multiple=4)
    budget = int(0.65 * whole(curves))
    near, exact = (
        solver(curves, budget, constraints(curves, **kept)) for solver in (solve_constrained, solve_constrained_exactly)
    )
    assert near.bound * (1 - 1e-9) <= exact.error <= near.error
    assert exact.bound >= near.bound * (1 - 1e-9)
    more = spectral(blocks=8, multiple=2)
    wide = constraints(more, **kept)
    stopped = solve_constrained_exactly(more, 2 * budget, wide, seconds=0.05)
    assert stopped.error <= solve_constrained(more, 2 * budget, wide).error
    assert stopped.gap > 0


@pytest.mark.parametrize("solver", [solve_constrained, solve_constrained_exactly])
@pytest.mark.parametrize("kept", [{"cap": 0.75}, {"monotone": True}, {"floor": 0.5}], ids=str)
def test_what_no_error_has_a_use_for_is_spent_within_the_constraints(kept, solver):
    curves = [Curve(c.path, c.ranks, c.costs, np.where(np.arange(len(c)) < 4, c.errors, 0.0)) for c in spectral()]
    budget = int(0.7 * whole(curves))
    solution = solver(curves, budget, constraints(curves, **kept))
    found = fractions(solution, curves)
    assert found == sorted(found, reverse=True) if kept.get("monotone") else max(found) <= kept.get("cap", 1)
    smallest = max(int(np.diff(c.costs[:-1]).max()) for c in curves)
    assert 0 <= budget - solution.cost < smallest


def nearest(curves, budget, solver, **kept):
    """The value that the error of an impossible wish names."""
    with pytest.raises(BudgetError) as raised:
        solver(curves, budget, constraints(curves, **kept))
    found = re.search(r"a block_(floor|cap) of at (?:most|least) ([\d.]+)", raised.value.hint)
    return str(raised.value), {found[1]: float(found[2])} if found else None


@pytest.mark.parametrize("solver", [solve_constrained, solve_constrained_exactly])
@pytest.mark.parametrize(
    "kept, message",
    [
        ({"floor": 0.8, "cap": 0.5}, "block_floor 0.8 is above the block_cap 0.5"),
        ({"floor": 0.7}, "where every block keeps at least 0.7, they store"),
        ({"floor": 0.7, "monotone": True}, "at least 0.7 and falls with depth, they store"),
        ({"cap": 0.01}, "block 0 keeps at least 0.0"),
    ],
    ids=str,
)
def test_constraints_that_cannot_be_met_name_the_nearest_value_that_can(kept, message, solver):
    curves = spectral(blocks=3)
    budget = int(0.5 * whole(curves))
    text, hint = nearest(curves, budget, solver, **kept)
    assert message in text
    assert "block" in text
    solution = solve_constrained(curves, budget, constraints(curves, **{**kept, **hint}))
    assert solution.cost <= budget


def test_a_block_whose_ranks_are_bounded_is_named():
    curves = spectral(blocks=3)
    small = [c.choose(np.arange(len(c)) < len(c) // 2) if c.path.startswith("1.") else c for c in curves]
    limits = Constraints(constraints(curves).blocks, constraints(curves).whole, floor=0.6)
    budget = int(0.7 * whole(curves))
    with pytest.raises(BudgetError, match=r"block 1 keeps at most 0\.\d+ of its parameters, at its largest") as raised:
        solve_constrained(small, budget, limits)
    floor = float(re.search(r"at most ([\d.]+)$", raised.value.hint)[1])
    assert solve_constrained(small, budget, replace(limits, floor=floor)).cost <= budget
    large = [c.choose(np.arange(len(c)) >= len(c) - 1) if c.path.startswith("2.") else c for c in small]
    with pytest.raises(BudgetError, match=r"block 2 keeps at least 1\.0000 .* block 1, before it, at most 0\."):
        solve_constrained(large, whole(curves), replace(limits, floor=0.0, monotone=True))


def test_a_block_without_ranks_between_its_bounds_is_named():
    curves = [Curve(f"{i}.0", np.array([1, 2]), np.array([10, 100]), np.array([2.0, 1.0])) for i in range(2)]
    limits = Constraints({"0.0": 0, "1.0": 1}, {"0.0": 100, "1.0": 100}, floor=0.4, cap=0.6)
    with pytest.raises(BudgetError, match=r"no ranks of block 0 keep 0\.4 to 0\.6 .* the nearest keep 0\.1000"):
        solve_constrained(curves, 150, limits)
    assert solve_constrained(curves, 150, replace(limits, floor=0.1)).cost == 20


def sparse(seed):
    """Blocks of few candidates, most of whose sizes no plan has, an order or a floor, and a budget."""
    rng = np.random.default_rng(seed)
    curves = [
        Curve(f"{b}.{i}", np.arange(n), np.cumsum(rng.integers(1, 40, n)), np.sort(rng.random(n))[::-1].copy())
        for b, i, n in [(b, i, int(rng.integers(2, 7))) for b in range(3) for i in range(2)]
    ]
    budget = int(rng.uniform(0.5, 0.95) * whole(curves))
    floor = round(rng.uniform(0.3, 1.0) * budget / whole(curves), 3)
    cap = round(rng.uniform(floor, 1.0), 3) if seed % 3 == 0 else 1.0
    return curves, budget, {"floor": floor, "cap": cap, "monotone": seed % 2 == 0}


def every_plan(curves):
    """What each block keeps under every plan (plans x blocks), as a fraction, and what every plan stores."""
    picks = np.indices([len(c) for c in curves]).reshape(len(curves), -1)
    stored = np.stack([c.costs[p] for c, p in zip(curves, picks, strict=True)], axis=1)
    totals = np.array([int(c.costs[-1]) for c in curves])
    return stored.reshape(len(stored), -1, 2).sum(-1) / totals.reshape(-1, 2).sum(-1), stored.sum(-1)


def in_bounds(kept, floor, cap, monotone):
    """Which plans (plans x blocks) keep to the bounds."""
    falls = (np.diff(kept, axis=1) <= 0).all(1) if monotone else True
    return (kept.min(1) >= floor) & (kept.max(1) <= cap) & falls


@pytest.mark.parametrize("seed", range(60))
def test_a_plan_is_found_if_there_is_any_and_else_the_nearest_bound_that_has_one(seed):
    curves, budget, kept = sparse(seed)
    every, stored = every_plan(curves)
    fitting = every[stored <= budget]
    if not in_bounds(fitting, **kept).any():
        text, hint = nearest(curves, budget, solve_constrained, **kept)
        kept = {**kept, "cap": 1.0} if "no block_cap, and" in text else kept
        if hint is None:
            assert "a larger budget" in text
            assert not in_bounds(fitting, 0.0, 1.0, kept["monotone"]).any()
            return
        (name, value), step = next(iter(hint.items())), {"floor": 1e-4, "cap": -1e-4}
        beyond = {**kept, name: value + step[name]}
        assert not in_bounds(fitting, **beyond).any()
        kept = {**kept, **hint}
    solution = solve_constrained(curves, budget, constraints(curves, **kept))
    assert solution.cost <= budget
    assert in_bounds(np.array([fractions(solution, curves)]), **kept).all()
