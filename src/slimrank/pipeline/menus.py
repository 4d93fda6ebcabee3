"""What a target may become, where a recipe lets form, rank and bits be chosen together."""

from __future__ import annotations

from slimrank.budget.curves import Limits
from slimrank.budget.menu import Candidate, Menu
from slimrank.budget.ranks import Rank
from slimrank.errors import RecipeError
from slimrank.layers.quantized_forms import quantized_form
from slimrank.recipe import Recipe

CORRECTION_RANKS = (8, 16, 32)  # of a pair that makes up for rounding
CORRECTION_SCHEME = "int8"


def menu_of(recipe: Recipe, shape: tuple[int, int], width: int, limits: Limits) -> Menu:
    """Return the candidates of a target of this shape.

    Args:
        recipe: says which widths and forms are allowed.
        shape: (m, n).
        width: bits of a number of the dense weight.
        limits: a target that is to stay dense has no choice.

    Raises:
        RecipeError: a group that does not divide its columns.
    """
    m, n = shape
    dense = Candidate(None, "dense", 0, m * n * width)
    if limits.dense:
        return Menu((dense,))
    every = [dense]
    for bits in recipe.bits:
        scheme = recipe.scheme(bits)
        if not scheme.divides(n):
            raise RecipeError(
                f"groups of {recipe.group_size} do not divide the {n} columns of a weight.",
                "another --group-size, or 0 for one scale a row",
            )
        if "dense" in recipe.forms:
            every.append(_candidate(f"dense:{scheme}", "dense", bits, shape, width))
        if "residual" in recipe.forms:
            names = ((f"residual:{scheme}/{CORRECTION_SCHEME}", rank) for rank in CORRECTION_RANKS if rank < min(m, n))
            every += [_candidate(name, rank, bits, shape, width) for name, rank in names]
    return Menu.of([candidate for candidate in every if candidate.cost <= dense.cost])


def _candidate(name: str, rank: Rank, bits: int, shape: tuple[int, int], width: int) -> Candidate:
    return Candidate(name, rank, bits, quantized_form(name).bits(*shape, rank, width))
