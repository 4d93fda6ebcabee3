import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimrank.budget.problem import Item, Problem
from slimrank.budget.rank_plan import RankPlan
from slimrank.budget.stated import Budget
from slimrank.errors import BudgetError, PlanError, RecipeError
from slimrank.layers.forms import PAIR
from slimrank.methods.allocator import ALLOCATORS

SHAPES = {"a": (576, 576), "b": (192, 576), "c": (1536, 576), "d": (576, 1536), "e": (576, 576)}
TOTAL = sum(m * n for m, n in SHAPES.values())


UNIFORM = ALLOCATORS.get("uniform").configured({})  # here, so that no example is charged for imports


def uniform(shapes, budget, multiple):
    items = tuple(Item(path, shape) for path, shape in shapes.items())
    return UNIFORM.allocate(Problem(items, budget, multiple)).ranks


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_break_even(m, n):
    r = PAIR.largest_rank(m, n)
    assert PAIR.parameters(m, n, r) < PAIR.parameters(m, n, "dense") <= PAIR.parameters(m, n, r + 1)


@given(st.integers(20, 1000), st.sampled_from([1, 8, 16]))
@settings(max_examples=100)
def test_budget_contract(per_mille, multiple):
    budget = TOTAL * per_mille // 1000
    try:
        ranks = uniform(SHAPES, budget, multiple)
    except BudgetError:
        assert any(m * n * budget // TOTAL < PAIR.parameters(m, n, multiple) for m, n in SHAPES.values())
        return
    plan = RankPlan.build(ranks, SHAPES, "uniform", budget)
    plan.check(SHAPES)
    assert plan.parameters <= budget
    assert ranks["a"] == ranks["e"]
    for path, rank in ranks.items():
        m, n = SHAPES[path]
        share = m * n * budget // TOTAL
        if rank == "dense":
            assert share >= m * n
        else:
            assert rank % multiple == 0
            assert PAIR.parameters(m, n, rank) <= share < PAIR.parameters(m, n, rank + multiple)


def test_the_papers_ranks():
    """floor(keep m n / (m + n)), as SVD-LLM's code cuts."""
    for keep in (0.9, 0.8, 0.6, 0.4):
        ranks = uniform(SHAPES, int(keep * TOTAL), 1)
        assert ranks == {p: int(keep * m * n / (m + n)) for p, (m, n) in SHAPES.items()}


def test_keeping_all_is_dense_and_order_does_not_matter():
    assert set(uniform(SHAPES, TOTAL, 1).values()) == {"dense"}
    backwards = dict(reversed(SHAPES.items()))
    assert uniform(backwards, TOTAL // 2, 1) == uniform(SHAPES, TOTAL // 2, 1)


def test_infeasible_budgets_say_what_is_feasible():
    with pytest.raises(BudgetError, match=r"keep_ratio of at least 0\.0"):
        uniform(SHAPES, TOTAL // 1000, 1)
    with pytest.raises(BudgetError, match="smaller rank_multiple"):
        uniform(SHAPES, TOTAL // 2, 128)
    with pytest.raises(RecipeError, match="did you mean 'uniform'"):
        ALLOCATORS.get("unifrom")


@pytest.mark.parametrize(
    "option, value, parameters",
    [
        ("keep_ratio", 0.8, 80), ("keep_total", 0.8, 70), ("max_bytes", 480, 70), ("max_bytes", 10**6, 100),
        ("keep_total", 0.3, 0), ("max_bytes", 200, 0),
    ],
)  # fmt: skip
def test_budgets_in_other_units(option, value, parameters):
    assert Budget(option, value, targets=100, total=150, width=32, besides=200).bits == 32 * parameters


def test_plan_round_trip(tmp_path):
    plan = RankPlan.build(uniform(SHAPES, TOTAL // 2, 1), SHAPES, "uniform", TOTAL // 2)
    plan.save(tmp_path / "plan.json")
    assert RankPlan.load(tmp_path / "plan.json") == plan
    assert list(plan.targets) == list(SHAPES)
    assert plan.keep_ratio == pytest.approx(0.5, abs=2e-3)
    assert plan.factored() == {p: t.rank for p, t in plan.targets.items()}


def edited(change):
    plan = RankPlan.build(dict.fromkeys(SHAPES, 8), SHAPES, "uniform", TOTAL // 2)
    content = plan.model_dump()
    change(content)
    return RankPlan.model_validate_json(json.dumps(content))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: p["targets"].pop("a"), "lacks 1 targets, e.g. 'a'"),
        (lambda p: p["targets"].update(q_porj=p["targets"]["a"]), "names 'q_porj'"),
        (lambda p: p["targets"]["a"].update(shape=[4, 4], rank=2), "in the plan and"),
        (lambda p: p["targets"]["b"].update(rank=193), r"rank 193 of 'b' is outside 1\.\.192"),
        (lambda p: p["targets"]["b"].update(rank=0), "outside"),
        (lambda p: p.update(budget=10), "over its budget of 10"),
    ],
)
def test_plans_that_do_not_fit(change, message):
    with pytest.raises(PlanError, match=message):
        edited(change).check(SHAPES)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"extra": 1, "targets": {}}',
        *('{"targets": {"a": {"shape": [2, 2], "rank": ' + rank + "}}}" for rank in ("1.5", "1.0", "true", '"1"')),
        '{"targets": {"a": {"rank": 1, "shape": [2.0, 2]}}}',
    ],
)
def test_files_that_are_no_plan(tmp_path, content):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(PlanError, match="is not a rank plan"):
        RankPlan.load(tmp_path / "p.json")
    with pytest.raises(PlanError, match="cannot be read"):
        RankPlan.load(tmp_path / "none.json")
