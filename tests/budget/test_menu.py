"""Form, rank and bits of every target chosen together: menus, their curves, and allocations of them."""

from itertools import product

import numpy as np
import pytest

from slimrank.budget.curves import Limits
from slimrank.budget.menu import Candidate, Menu, Noise
from slimrank.budget.problem import Item, Problem
from slimrank.errors import BudgetError, RecipeError
from slimrank.layers.forms import layer_form
from slimrank.methods.allocator import ALLOCATORS
from slimrank.pipeline.menus import menu_of
from slimrank.recipe import Recipe

NOISE = Noise(0.01, {8: 0.8, 16: 0.6, 32: 0.3})


def recipe(**options):
    return Recipe.make({"max_bytes": 10**6, "bits": (2, 3, 4, 6, 8), "group_size": 16, **options})


def problem(budget, count=3, seed=0, **options):
    """Items of different energies and noises, with menus that were measured."""
    draw = np.random.default_rng(seed)
    items = tuple(Item(f"layer.{i}", (32, 64), i, "layer", width=16) for i in range(count))
    menus = {
        item.path: menu_of(recipe(**options), item.shape, 16, Limits()).measured(
            Noise(float(draw.uniform(0.002, 0.05)), {rank: float(draw.uniform(0.2, 0.9)) for rank in (8, 16, 32)})
        )
        for item in items
    }
    spectra = {item.path: (draw.uniform(0.1, 5.0) * np.ones(32), 0.0) for item in items}
    return Problem(items, budget, spectra=spectra, menus=menus, in_loss=True)


def test_a_bit_more_quarters_the_loss_and_a_correction_lowers_it():
    assert NOISE.of(Candidate("dense:int4", "dense", 4, 1)) == 0.01
    assert NOISE.of(Candidate("dense:int6", "dense", 6, 1)) == pytest.approx(0.01 / 16)
    assert NOISE.of(Candidate("residual:int3/int8", 16, 3, 1)) == pytest.approx(0.04 * 0.6)
    assert NOISE.of(Candidate(None, "dense", 0, 1)) == 0


@pytest.mark.parametrize("forms", [("dense",), ("residual",), ("dense", "residual")])
def test_a_menu_has_every_form_and_width_at_its_true_cost(forms):
    menu = menu_of(recipe(forms=forms), (64, 96), 16, Limits())
    costs = [c.cost for c in menu.candidates]
    assert costs == sorted(set(costs))
    assert menu.candidates[-1] == Candidate(None, "dense", 0, 64 * 96 * 16)
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
    menu = menu_of(recipe(), (64, 96), 16, Limits()).measured(NOISE)
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
    with pytest.raises(RecipeError, match="cannot be measured before"):
        ALLOCATORS.get("lems").configured({"search": True}).check(problem(10**6))


def test_a_budget_that_no_width_meets_is_refused():
    with pytest.raises(
        BudgetError, match="smallest forms that the widths allow take 2,400 bytes, and the budget leaves"
    ):
        problem(19_199).check()
    problem(19_200).check()


def test_of_candidates_that_cost_the_same_the_one_of_most_bits_stays():
    menu = Menu.of([Candidate("dense:int2", "dense", 2, 5), Candidate("dense:int3", "dense", 3, 5)])
    assert [c.width for c in menu.candidates] == [3]


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
