"""Form, rank and bits of every target chosen together: menus, their curves, and allocations of them."""

from itertools import product

import numpy as np
import pytest

from slimrank.budget.curves import Limits
from slimrank.budget.menu import Candidate, Family, Loss, Menu
from slimrank.budget.problem import Item, Problem
from slimrank.errors import BudgetError, PlanError, RecipeError
from slimrank.layers.forms import layer_form
from slimrank.methods.allocator import ALLOCATORS
from slimrank.pipeline.menus import menu_of
from slimrank.recipe import Recipe

DENSE = Family("dense:{}", "dense")
LEFT = {8: 0.8, 16: 0.6, 32: 0.3}


def residual(rank):
    return Family("residual:{}/int8", rank)


def losses(at_four=0.01, left=LEFT):
    return {DENSE: Loss(at_four), **{residual(rank): Loss(at_four * share) for rank, share in left.items()}}


def recipe(**options):
    return Recipe.make({"max_bytes": 10**6, "bits": (2, 3, 4, 6, 8), "group_size": 16, **options})


def problem(budget, count=3, seed=0, **options):
    """Items of different energies and noises, with menus that were measured."""
    draw = np.random.default_rng(seed)
    items = tuple(Item(f"layer.{i}", (32, 64), i, "layer", width=16) for i in range(count))
    menus = {
        item.path: menu_of(recipe(**options), item.shape, 16, Limits()).measured(
            losses(float(draw.uniform(0.002, 0.05)), {rank: float(draw.uniform(0.2, 0.9)) for rank in (8, 16, 32)})
        )
        for item in items
    }
    spectra = {item.path: (draw.uniform(0.1, 5.0) * np.ones(32), 0.0) for item in items}
    return Problem(items, budget, spectra=spectra, menus=menus, in_loss=True)


def test_a_bit_more_quarters_the_loss_and_a_correction_lowers_it():
    every = (
        Candidate(DENSE, "dense:int3", 3, 1),
        Candidate(DENSE, "dense:int4", 4, 2),
        Candidate(residual(16), "residual:int3/int8", 3, 3),
        Candidate(DENSE, "dense:int6", 6, 4),
        Candidate(None, None, 0, 5),
    )
    found = Menu.of(every).measured(losses()).errors()
    assert found.tolist() == pytest.approx([0.04, 0.01, 0.04 * 0.6, 0.01 / 16, 0])
    assert Loss(0.01, cut=0.1).at(3) == pytest.approx(0.14)


@pytest.mark.parametrize("forms", [("dense",), ("residual",), ("dense", "residual"), ("pair",), ("dense", "pivot")])
def test_a_menu_has_every_form_and_width_at_its_true_cost(forms):
    menu = menu_of(recipe(forms=forms), (64, 96), 16, Limits())
    costs = [c.cost for c in menu.candidates]
    assert costs == sorted(costs)
    assert menu.candidates[-1] == Candidate(None, None, 0, 64 * 96 * 16)
    for candidate in menu.candidates[:-1]:
        assert candidate.form.partition(":")[0] in forms
        assert candidate.cost == layer_form(candidate.form).bits(64, 96, candidate.rank, 16)
    assert {c.width for c in menu.candidates} == {0, 2, 3, 4, 6, 8}


def test_a_target_that_stays_dense_has_no_choice():
    assert len(menu_of(recipe(), (64, 96), 16, Limits(dense=True)).candidates) == 1


def test_groups_must_divide_the_columns():
    with pytest.raises(RecipeError, match="groups of 16 do not divide the 40 columns"):
        menu_of(recipe(), (64, 40), 16, Limits())


def test_a_curve_leaves_out_what_cheaper_candidates_beat():
    menu = menu_of(recipe(), (64, 96), 16, Limits()).measured(losses())
    curve = menu.curve("layer", 2.0)
    kept = set(curve.ranks.tolist())
    errors = menu.errors()
    for number, candidate in enumerate(menu.candidates):
        beaten = any(errors[i] <= errors[number] for i, c in enumerate(menu.candidates) if c.cost < candidate.cost)
        assert (number not in kept) == beaten
    assert curve.errors.tolist() == pytest.approx((2.0 * errors[curve.ranks]).tolist())


@pytest.mark.parametrize("solver", ["lagrange", "exact"])
@pytest.mark.parametrize("share", [0.2, 0.3, 0.5])
def test_the_choice_is_the_best_of_all(share, solver):
    """Every combination of candidates of three items is tried."""
    made = problem(int(share * 3 * 32 * 64 * 16))
    found = ALLOCATORS.get("spectrum").configured({"solver": solver}).allocate(made)
    menus = [made.menus[item.path] for item in made.items]
    energies = [float(made.tail(item)[0]) for item in made.items]
    errors = [energy * menu.errors() for energy, menu in zip(energies, menus, strict=True)]
    best = np.inf
    for picks in product(*(range(len(menu.candidates)) for menu in menus)):
        if sum(menu.candidates[pick].cost for menu, pick in zip(menus, picks, strict=True)) <= made.budget:
            best = min(best, sum(e[pick] for e, pick in zip(errors, picks, strict=True)))
    picks = [int(found.picks[item.path]) for item in made.items]
    mine = sum(e[pick] for e, pick in zip(errors, picks, strict=True))
    assert mine == pytest.approx(best, rel=1e-9)
    for item, menu, pick in zip(made.items, menus, picks, strict=True):
        assert found.ranks[item.path] == menu.candidates[pick].rank
        assert found.forms.get(item.path) == menu.candidates[pick].form


def test_all_budgets_are_met_and_more_bits_are_never_worse():
    errors = []
    for share in np.linspace(0.2, 1.0, 12):
        made = problem(int(share * 3 * 32 * 64 * 16), seed=3)
        found = ALLOCATORS.get("spectrum").configured({}).allocate(made)
        costs = [made.menus[path].candidates[int(pick)].cost for path, pick in found.picks.items()]
        assert sum(costs) <= made.budget
        errors.append(sum(float(c.errors[c.index(found.picks[c.path])]) for c in found.curves))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


def test_allocations_that_choose_ranks_only_are_refused():
    for id in ("uniform", "ada_cr", "mrcs"):
        with pytest.raises(RecipeError, match=f"'{id}' chooses ranks only, no bits") as found:
            ALLOCATORS.get(id).configured({}).check(problem(10**6))
        assert "--allocation spectrum" in found.value.hint
    with pytest.raises(RecipeError, match="not searched by measuring"):
        ALLOCATORS.get("lems").configured({"search": True}).check(problem(10**6))


def test_a_budget_that_no_width_meets_is_refused():
    with pytest.raises(
        BudgetError, match="smallest forms that the widths allow take 2,400 bytes, and the budget leaves"
    ):
        problem(19_199).check()
    problem(19_200).check()


def test_of_candidates_that_cost_the_same_the_best_is_in_the_curve():
    menu = Menu.of([Candidate(DENSE, "dense:int2", 2, 5), Candidate(DENSE, "dense:int3", 3, 5)]).measured(losses())
    assert [menu.candidates[int(number)].width for number in menu.curve("layer", 1.0).ranks] == [3]


def test_factors_have_ranks_of_whole_groups():
    for shape in ((64, 96), (96, 64), (64, 64)):
        menu = menu_of(recipe(forms=("pair", "pivot")), shape, 16, Limits())
        ranks = {family.rank for family in menu.families}
        assert ranks <= {16, 32, 48}
        assert {family.form for family in menu.families} == {"pair:{}", "pivot:{}", "pivot:{}/int8"}
        for c in menu.candidates[:-1]:
            assert layer_form(c.form).fits(*shape, c.rank)


def test_bounds_of_ranks_leave_factors_only():
    menu = menu_of(recipe(forms=("dense", "pair", "residual")), (64, 96), 16, Limits(20, 40))
    assert {family.rank for family in menu.families} == {32}
    assert {c.form.partition(":")[0] for c in menu.candidates} == {"pair"}
    with pytest.raises(PlanError, match="no form of a 64 x 96 weight has a rank between 20 and 40"):
        menu_of(recipe(), (64, 96), 16, Limits(20, 40))


def test_only_families_that_may_beat_dense_weights_are_measured():
    """Against the straight line, in bits and logarithms, between the widths of dense weights."""
    menu = menu_of(recipe(forms=("dense", "pair"), bits=(3, 4)), (64, 96), 16, Limits()).measured({DENSE: Loss(0.01)})
    dense = {c.width: c.cost for c in menu.candidates if c.family == DENSE}
    for family in menu.families[1:]:
        costs = [c.cost for c in menu.candidates if c.family == family]
        for cut in (0.001, 0.009, 0.011, 0.02, 0.05):
            expected = False
            for cost in costs:
                bits = 3 + (cost - dense[3]) / (dense[4] - dense[3])
                expected |= cost < dense[3] or cut < 0.01 * 4 ** (4 - min(4, bits))
            assert menu.worth_measuring(family, cut) == expected
        assert menu.measured({}).worth_measuring(family, 1.0)


def test_a_family_without_a_loss_is_not_chosen():
    menu = menu_of(recipe(forms=("dense", "pair")), (64, 96), 16, Limits()).measured({DENSE: Loss(0.01)})
    assert {menu.candidates[int(i)].rank for i in menu.curve("layer", 1.0).ranks} == {"dense"}


def test_recipes_with_bits():
    assert recipe(bits="6,3,4,3").bits == (3, 4, 6)
    assert recipe(forms="residual,dense").forms == ("dense", "residual")
    for options, match in (
        ({"bits": (1,)}, "2 to 8 bits"),
        ({"bits": ("x",)}, "invalid literal|bits"),
        ({"forms": ("pear",)}, "forms"),
        ({"quantize": "int8"}, "give only one of bits and quantize"),
        ({"max_bytes": None, "keep_ratio": 0.5}, "within a byte budget"),
        ({"store_form": "pivot"}, "leave out store_form"),
    ):
        with pytest.raises(RecipeError, match=match):
            recipe(**options)
