"""The nearest feasible value that an error names is accepted, and one a little smaller is not."""

import re
from dataclasses import replace

import numpy as np
import pytest

from problems import problem
from slimrank.budget.curves import Limits
from slimrank.budget.rank_plan import RankPlan
from slimrank.budget.stated import Budget
from slimrank.errors import BudgetError
from slimrank.methods.allocator import ALLOCATORS
from slimrank.pipeline.preview import preview

HINT = re.compile(r"a (keep_ratio|keep_total|max_bytes) of at least ([\d.]+)")
STEP = {"keep_ratio": 1e-4, "keep_total": 1e-4, "max_bytes": 1}


def hinted(attempt):
    """(option, value) of the hint of an attempt that must fail."""
    with pytest.raises(BudgetError) as raised:
        attempt()
    option, value = HINT.search(raised.value.hint).groups()
    return option, int(value) if option == "max_bytes" else float(value)


def check(attempt, option, value):
    """An attempt fails; with the value of its hint it does not, and with a little less it does."""
    found, hint = hinted(lambda: attempt(**{option: value}))
    assert found == option
    attempt(**{option: hint})
    least = round(hint - STEP[option], 4)
    assert least <= value or hinted(lambda: attempt(**{option: least})) == (option, hint)


@pytest.mark.parametrize("option, value", [("keep_ratio", 0.001), ("keep_total", 0.001), ("max_bytes", 1)])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "svd_llm"},
        {"rank_multiple": 4},
        {"ranks": {"down_proj": "8..12", "q_proj": "dense"}},
        {"ranks": {"*": "2..4"}, "allocation": "spectrum"},
        {"refine": "update", "refine_options": {"bias": "all"}},
        {"method": "basis_sharing", "allocation": "spectrum"},
    ],
    ids=str,
)
def test_budgets_in_the_unit_that_they_were_stated_in(tiny_folder, options, option, value):
    check(lambda **budget: preview(tiny_folder, evaluation=None, **options, **budget), option, value)


def test_a_budget_that_nothing_meets_names_no_value(tiny_folder):
    options = {"refine": "update", "refine_options": {"bias": "all"}, "ranks": {"*": "dense"}, "evaluation": None}
    with pytest.raises(BudgetError, match="no keep_ratio is enough"):
        preview(tiny_folder, keep_ratio=1.0, **options)


def accepted(id, given, ratio, **options):
    budget = Budget("keep_ratio", ratio, int(given.sizes.sum()), int(given.sizes.sum()))
    return ALLOCATORS.get(id).configured(options).allocate(replace(given, budget=budget.bits, stated=budget))


@pytest.mark.parametrize("id", ["uniform", "spectrum", "shared", "lems"])
@pytest.mark.parametrize("seed", range(6))
def test_whatever_the_bounds(id, seed):
    """Sizes are those of the dense weights, also where a maximum makes the largest rank allowed smaller."""
    rng = np.random.default_rng(seed)
    given = problem(0.6, multiple=int(rng.integers(1, 4)), seed=seed)
    bounds = {role: Limits(int(rng.integers(1, 6)), int(rng.integers(6, 12))) for role in ("attn.q", "mlp.up")}
    items = tuple(replace(i, limits=bounds.get(i.role, i.limits)) for i in given.items)
    check(lambda keep_ratio: accepted(id, replace(given, items=items), keep_ratio), "keep_ratio", 0.01)


def test_a_plan_over_the_budget(tmp_path):
    given = problem(0.6)
    ranks = ALLOCATORS.get("spectrum").configured({}).allocate(given).ranks
    RankPlan.build(ranks, {i.path: i.shape for i in given.items}, "spectrum", given.budget).save(tmp_path / "p.json")
    check(lambda keep_ratio: accepted("from_plan", given, keep_ratio, file=str(tmp_path / "p.json")), "keep_ratio", 0.5)


@pytest.mark.parametrize("parameters", [1, 33, 99, 100])
@pytest.mark.parametrize("option", STEP)
def test_there_and_back(option, parameters):
    stated = Budget(option, 1, targets=100, total=150, width=32, besides=219, added=3 if option == "max_bytes" else 0)
    found = HINT.search(stated.needed(32 * parameters))[2]
    value = int(found) if option == "max_bytes" else float(found)
    assert replace(stated, value=value).bits >= 32 * parameters
