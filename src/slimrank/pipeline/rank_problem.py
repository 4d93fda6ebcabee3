"""From a recipe and the targets of a model to the rank problem, and the first plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from math import gcd, lcm
from typing import Any

import numpy as np

from slimrank.budget.curves import Limits
from slimrank.budget.knapsack import solve
from slimrank.budget.problem import Allocation, Item, Problem
from slimrank.budget.proportional import ranks_from_fractions
from slimrank.budget.rank_plan import RankPlan
from slimrank.budget.ranks import Rank
from slimrank.budget.stated import BYTE_BITS, Budget
from slimrank.errors import PlanError, RecipeError
from slimrank.layers.forms import layer_form
from slimrank.linalg.scheme import Scheme
from slimrank.methods.allocator import ConfiguredAllocator
from slimrank.models.targets import TargetSet, matches, role_of
from slimrank.pipeline.kv_limits import kv_limits
from slimrank.pipeline.menus import menu_of
from slimrank.pipeline.model_bytes import ModelBytes, new_biases
from slimrank.pipeline.units import Unit, shares_of
from slimrank.recipe import Recipe


def adopt_plan_form(recipe: Recipe) -> Recipe:
    """Return the recipe with the form of the plan that it names, if it names one.

    Raises:
        PlanError: the plan cannot be read.
        RecipeError: the recipe asks for another form.
    """
    plan = _named_plan(recipe)
    if plan is None:
        return recipe
    if recipe.form != "pair" and plan.cost_model != recipe.form:
        hint = f"--store-form {recipe.form} stores them so" if plan.cost_model == "pair" else "leave out --form"
        raise RecipeError(f"form is {recipe.form}; the plan's ranks were chosen for {plan.cost_model}s.", hint)
    if recipe.store_form and plan.cost_model != "pair":
        raise RecipeError(
            f"the plan's ranks were chosen for {plan.cost_model} layers already.", "leave out --store-form"
        )
    return recipe.model_copy(
        update={"form": plan.cost_model, "store_form": recipe.store_form or plan.secondary},
    )


def _named_plan(recipe: Recipe) -> RankPlan | None:
    return RankPlan.load(recipe.plan) if isinstance(recipe.plan, str) else recipe.plan


def given_plan(recipe: Recipe, targets: TargetSet, units: list[Unit]) -> RankPlan | None:
    """Return the plan that the recipe names, with the recipe's stored form; check it against the model.

    Raises:
        PlanError: it does not fit the model.
    """
    plan = _named_plan(recipe)
    if plan is None:
        return None
    plan.check({t.path: t.shape for t in targets}, shares_of(units))
    return plan.model_copy(update={"secondary": recipe.store_form})


def make_problem(recipe: Recipe, model: Any, targets: TargetSet, units: list[Unit], size: ModelBytes) -> Problem:
    """Make the rank problem, without spectra.

    Raises:
        PlanError: the recipe's `ranks` leave targets that share a factor no common one.
        RecipeError: a pattern in `ranks` matches no target.
    """
    stated = _budget(recipe, model, targets, size)
    limits = _limits(recipe, [t.path for t in targets])
    if recipe.kv_keep is not None:
        limits |= kv_limits(recipe.kv_keep, targets, limits)
    widths = size.widths(stated.option)
    items = tuple(_item(unit, limits, targets.blocks_path, widths) for unit in units)
    menus = {t.path: menu_of(recipe, t.shape, widths[t.path], limits[t.path]) for t in targets} if recipe.bits else {}
    form = recipe.quantized_as() if recipe.max_bytes is not None and recipe.quantize else recipe.form
    return Problem(items, stated.bits, _multiple(recipe), layer_form(form), stated=stated, menus=menus)


def _multiple(recipe: Recipe) -> int:
    """Return what ranks are multiples of: of the groups, too, that share a scale."""
    group = Scheme.parse(recipe.quantize).group if recipe.quantize else None
    return lcm(int(recipe.rank_multiple), group or 1)


def _item(unit: Unit, limits: Mapping[str, Limits], blocks_path: str, widths: Mapping[str, int]) -> Item:
    first = unit.targets[0]
    members = {t.path: t.shape for t in unit.targets}
    width, role = max(widths[path] for path in members), role_of(first, blocks_path)
    return Item(unit.path, unit.shape, first.block, role, _common(unit, limits), members, width)


def _common(unit: Unit, limits: Mapping[str, Limits]) -> Limits:
    """Return the limits that all targets of a unit allow."""
    for one, other in combinations([t.path for t in unit.targets], 2):
        if limits[one].both(limits[other]) is None:
            raise PlanError(
                f"'ranks' leave '{one}' and '{other}', which share a factor, no common rank.",
                "bounds that overlap, or options of the method that share less",
            )
    return Limits.all_of(limits[t.path] for t in unit.targets)


def _budget(recipe: Recipe, model: Any, targets: TargetSet, size: ModelBytes) -> Budget:
    """Return the budget as it is stated; all parameters, if it is a time that is not measured yet."""
    given = (name for name in ("keep_ratio", "keep_total", "max_bytes") if getattr(recipe, name) is not None)
    option: Any = next(given, "keep_ratio")
    return Budget(
        option,
        1.0 if recipe.max_latency is not None else getattr(recipe, option),
        targets=targets.coverage.targets,
        total=targets.coverage.total,
        width=BYTE_BITS * size.largest_item,
        besides=size.besides(recipe, model, targets),
        added=new_biases(recipe, (t for t in targets if not t.bias)),
        target_bits=BYTE_BITS * size.targets,
        unit=gcd(*size.widths(option).values()),
    )


def plan_of(
    allocation: Allocation, recipe: Recipe, problem: Problem, targets: TargetSet, units: list[Unit]
) -> RankPlan:
    """Return the ranks of units as a plan of targets."""
    every = {t.path: allocation.ranks[unit.path] for unit in units for t in unit.targets}
    shapes = {t.path: t.shape for t in targets}
    return RankPlan.build(
        {path: every[path] for path in shapes},
        shapes,
        recipe.allocation,
        None if recipe.max_latency is not None else problem.budget,
        shares=shares_of(units),
        cost_model=recipe.form,
        secondary=recipe.store_form,
        widths={path: item.width for item in problem.items for path in item.targets},
        forms=allocation.forms or _rounded(recipe, every),
    )


def _rounded(recipe: Recipe, ranks: Mapping[str, Rank]) -> dict[str, str]:
    """Return the forms of targets where all weights are rounded alike."""
    return {path: recipe.quantized_as(rank) for path, rank in ranks.items()} if recipe.quantize else {}


def initial_allocation(problem: Problem, allocator: ConfiguredAllocator, latency: float | None) -> Allocation:
    """Allocate now if nothing else is needed; otherwise return provisional ranks.

    Args:
        problem: the rank problem, without spectra.
        allocator: what finds the ranks.
        latency: the fraction of the original's time, if that is the budget; a first guess of the size.

    Raises:
        BudgetError: the budget, or what is asked of blocks, cannot be met.
        PlanError: limits leave a target no rank, or a plan that does not fit.
    """
    if not allocator.needs:
        return allocator.allocate(problem)
    allocator.check(problem)
    return provisional(problem if latency is None else replace(problem, budget=_guess(problem, latency)))


def _guess(problem: Problem, latency: float) -> int:
    """Return a budget of about that part of all parameters in which the smallest ranks fit."""
    least = sum(int(costs.min()) for _, costs in problem.choices)
    return max(least, int(problem.budget * latency))


def provisional(problem: Problem) -> Allocation:
    """Return uniform ranks for use until the allocation is known; every feasible budget has them."""
    if problem.menus:
        curves = [problem.menus[item.path].curve(item.path, item.parameters) for item in problem.items]
        return Allocation.from_menus(problem.menus, solve(*problem.in_units(curves)).ranks)
    return Allocation(ranks_from_fractions(problem, np.zeros(len(problem.items))))


def _limits(recipe: Recipe, paths: Sequence[str]) -> dict[str, Limits]:
    """Return the limits of each target's rank; of several patterns that match, the last counts."""
    found = dict.fromkeys(paths, Limits())
    for pattern, limit in recipe.ranks.items():
        matching = [path for path in paths if matches(path, [pattern])]
        if not matching:
            raise RecipeError(f"the pattern '{pattern}' of 'ranks' matches no target.", f"paths look like {paths[0]}")
        found |= dict.fromkeys(matching, _limit(str(limit)))
    return found


def _limit(text: str) -> Limits:
    if text == "dense":
        return Limits(dense=True)
    least, dots, most = text.partition("..")
    if not dots:
        return Limits(int(least), int(least))
    return Limits(int(least or 1), int(most) if most else None)
