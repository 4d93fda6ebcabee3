"""From fractions to ranks: what is to stay dense does, and thousands of layers are no matter."""

import time

import numpy as np
import pytest

from problems import problem
from slimrank.budget.problem import Item, Problem
from slimrank.budget.proportional import ranks_from_fractions
from slimrank.layers.forms import PAIR


def test_what_is_to_stay_dense_does():
    """The others make room; a fraction of one that is shifted below it would be a pair of the same size that errs."""
    given = problem(0.8)
    fractions = np.full(len(given.items), 0.82)
    fractions[[1, 4, 7]] = 1.0
    ranks = ranks_from_fractions(given, fractions)
    assert [i for i, item in enumerate(given.items) if ranks[item.path] == "dense"] == [1, 4, 7]
    assert sum(PAIR.parameters(*i.shape, ranks[i.path]) for i in given.items) <= given.budget


def test_more_dense_than_fits_keeps_the_largest_fractions():
    given = problem(0.5)
    fractions = 1 + np.arange(len(given.items)) / 10
    ranks = ranks_from_fractions(given, fractions)
    dense = [i for i, item in enumerate(given.items) if ranks[item.path] == "dense"]
    assert dense
    assert dense[-1] == len(given.items) - 1
    assert sum(PAIR.parameters(*i.shape, ranks[i.path]) for i in given.items) <= given.budget


def handed_out(given, picks, wanted):
    """One candidate after the other to the target farthest below its fraction, written down plainly."""
    choices, sizes = given.choices, given.sizes
    order = sorted(range(len(picks)), key=lambda i: given.items[i].path)
    while True:
        left = given.budget - sum(int(choices[i][1][picks[i]]) for i in order)
        can = [i for i in order if picks[i] + 1 < len(choices[i][1])]
        can = [i for i in can if choices[i][1][picks[i] + 1] - choices[i][1][picks[i]] <= left]
        if not can:
            return [int(choices[i][0][picks[i]]) for i in range(len(picks))]
        best = max(can, key=lambda i: (round(wanted[i] - choices[i][1][picks[i]] / sizes[i], 12), -order.index(i)))
        picks[best] += 1


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("multiple", [1, 3])
def test_leftovers_go_to_who_is_farthest_below(multiple, alike):
    from slimrank.budget.proportional import bounds, floors, project

    for seed in range(6):
        given = problem(0.6, multiple, seed=seed, alike=alike)
        fractions = np.random.default_rng(seed).normal(0.6, 0.1, len(given.items)).clip(0.2, 0.95)
        wanted = project(fractions, given.sizes, *bounds(given), given.budget)
        expected = handed_out(given, floors(given, wanted * given.sizes), wanted)
        found = ranks_from_fractions(given, fractions)
        assert [-1 if r == "dense" else r for r in found.values()] == expected


def test_twelve_thousand_experts_take_under_a_second():
    items = tuple(Item(f"layers.{i // 384}.experts.{i % 384}", (768, 2048), i // 384, "e") for i in range(12_000))
    given = Problem(items, int(0.8 * 12_000 * 768 * 2048), 8)
    start = time.process_time()
    ranks_from_fractions(given, np.random.default_rng(0).normal(0.8, 0.2, 12_000))
    assert time.process_time() - start < 1
