"""What a target may become, where a recipe lets form, rank and bits be chosen together."""

from __future__ import annotations

from slimrank.budget.curves import Limits
from slimrank.budget.menu import Candidate, Family, Menu
from slimrank.budget.planned_target import KEEPS_WEIGHT
from slimrank.budget.ranks import Rank
from slimrank.errors import PlanError, RecipeError
from slimrank.layers.quantized_forms import quantized_bases, quantized_form
from slimrank.recipe import Recipe


def menu_of(recipe: Recipe, shape: tuple[int, int], width: int, limits: Limits) -> Menu:
    """Return the candidates of a target of this shape.

    Args:
        recipe: says which widths and forms are allowed.
        shape: (m, n).
        width: bits of a number of the dense weight.
        limits: a target that is to stay dense has no choice.

    Raises:
        RecipeError: a group that does not divide its columns.
        PlanError: bounds of ranks leave no form.
    """
    m, n = shape
    dense = Candidate(None, None, 0, m * n * width)
    if limits.dense:
        return Menu((dense,))
    if recipe.group_size and n % recipe.group_size:
        raise RecipeError(
            f"groups of {recipe.group_size} do not divide the {n} columns of a weight.",
            "another --group-size, or 0 for one scale a row",
        )
    families = [
        Family(form, rank)
        for name in recipe.forms
        for form, rank in quantized_bases()[name].choices(m, n, recipe.group_size or None)
        if _allowed(name, rank, limits)
    ]
    every = [_candidate(family, recipe, bits, shape, width) for family in families for bits in recipe.bits]
    found = [candidate for candidate in every if candidate.cost < dense.cost]
    if limits.most is None:
        found.append(dense)
    if not found:
        raise PlanError(
            f"no form of a {m} x {n} weight has a rank between {limits.least} and {limits.most}.",
            f"wider bounds, or forms that have ranks; these are {', '.join(recipe.forms)}",
        )
    return Menu.of(found)


def _allowed(form: str, rank: Rank, limits: Limits) -> bool:
    """Tell whether bounds of ranks allow a form: those that keep the weight have the largest rank."""
    if form in KEEPS_WEIGHT or rank == "dense":
        return limits.most is None
    return limits.least <= rank and (limits.most is None or rank <= limits.most)


def _candidate(family: Family, recipe: Recipe, bits: int, shape: tuple[int, int], width: int) -> Candidate:
    name = family.form.format(recipe.scheme(bits))
    return Candidate(family, name, bits, quantized_form(name).bits(*shape, family.rank, width))
