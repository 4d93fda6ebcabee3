"""Equal ranks for layers of the same role in consecutive blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from slimrank.budget.curves import Curve
from slimrank.budget.problem import Allocation, Item, Problem
from slimrank.errors import PlanError, RecipeError
from slimrank.methods.allocate.spectrum import Scale, spectral_curves
from slimrank.methods.allocator import allocator
from slimrank.methods.solver_options import least_error

Layers = Annotated[int, Field(ge=1, description="Consecutive blocks whose layers of the same role get one rank.")]


def check_groups(problem: Problem, options: Mapping[str, Any]) -> None:
    """Make sure that every group has ranks in common, which fit, and that nothing is asked of single blocks.

    Raises:
        BudgetError: the smallest ranks that groups have in common store more than the budget.
        PlanError: bounds of ranks leave a group none.
        RecipeError: side constraints by block with groups over several blocks.
    """
    if options["layers"] == 1:
        return
    if options["monotone"] or options["block_floor"] > 0 or options["block_cap"] < 1:
        raise RecipeError("side constraints by block cannot be combined with ranks shared between blocks.", "layers=1")
    curves = {curve.path: curve for curve in problem.flat_curves()}
    problem.check([_sum([curves[item.path] for item in members]) for members in _groups(problem, options["layers"])])


@allocator(
    id="shared",
    title="Least sum of squared errors, one rank for the same layer of consecutive blocks",
    paper="Basis Sharing, arXiv 2410.03765, and LEMS-shared: groups of equal rank",
    needs=["spectra"],
    solves=True,
    check=check_groups,
)
def shared(problem: Problem, *, layers: Layers = 2, scale: Scale = "auto", **solving: Any) -> Allocation:
    """Minimise as `spectrum` does; the curves of a group are added up, so it is one item of the knapsack.

    With `basis_sharing` the layers that share a factor are one item already.
    """
    curves = {curve.path: curve for curve in spectral_curves(problem, scale)}
    groups = _groups(problem, layers)
    merged = [_sum([curves[item.path] for item in members]) for members in groups]
    found = least_error(problem, merged, solving)
    ranks = {item.path: found.ranks[members[0].path] for members in groups for item in members}
    return Allocation({item.path: ranks[item.path] for item in problem.items}, tuple(curves.values()), gap=found.gap)


def _groups(problem: Problem, layers: int) -> list[list[Item]]:
    """Group the items that get one rank."""
    groups: defaultdict[tuple[str, tuple[int, int], int], list[Item]] = defaultdict(list)
    for item in problem.items:
        groups[item.role, item.shape, item.block // layers].append(item)
    return list(groups.values())


def _sum(curves: Sequence[Curve]) -> Curve:
    """Add up the curves of several items of the same shape, over the candidates that all have."""
    common = [r for r in curves[0].ranks.tolist() if all(r in c.ranks for c in curves)]
    if not common:
        raise PlanError(
            f"no rank is allowed for all of {', '.join(c.path for c in curves)}, which are to have one.",
            "other --rank bounds, or layers=1",
        )
    parts = [c.choose(np.isin(c.ranks, common)) for c in curves]
    costs = np.sum([p.costs for p in parts], axis=0)
    return Curve(curves[0].path, parts[0].ranks, costs, np.sum([p.errors for p in parts], axis=0))
