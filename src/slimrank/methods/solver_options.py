"""Options of every allocator that minimises a sum of errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from slimrank.budget.constrained import solve_constrained
from slimrank.budget.constrained_exact import solve_constrained_exactly
from slimrank.budget.constraints import Constraints, reachable_blocks
from slimrank.budget.curves import Curve
from slimrank.budget.exact import solve_exactly
from slimrank.budget.knapsack import solve
from slimrank.budget.problem import Allocation, Problem

Fraction = Annotated[float, Field(ge=0, le=1)]


class SolverOptions(BaseModel):
    """Options of the budget solver."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    solver: Annotated[
        Literal["lagrange", "exact"],
        Field(
            description="lagrange: fast, with a bound on its distance from the optimum; exact: HiGHS, to the optimum."
        ),
    ] = "lagrange"
    monotone: Annotated[bool, Field(description="No block keeps a larger fraction than the one before it.")] = False
    block_floor: Annotated[float, Field(ge=0, le=1, description="Least fraction that a block keeps.")] = 0.0
    block_cap: Annotated[float, Field(gt=0, le=1, description="Largest fraction that a block keeps.")] = 1.0


def least_error(problem: Problem, curves: Sequence[Curve], options: Mapping[str, Any]) -> Allocation:
    """Return the allocation of least total error, by the options of `SolverOptions`.

    Raises:
        BudgetError: no choice of ranks meets the budget and the constraints.
    """
    problem.check(curves)
    chosen, constraints = SolverOptions(**options), constraints_of(problem, options)
    counted, exact = problem.in_units(curves), chosen.solver == "exact"
    if constraints.any:
        found = (solve_constrained_exactly if exact else solve_constrained)(*counted, constraints)
    else:
        found = (solve_exactly if exact else solve)(*counted)
    if problem.menus:
        return Allocation.from_menus(problem.menus, found.ranks, curves=tuple(curves), gap=found.gap)
    return Allocation(found.ranks, tuple(curves), gap=found.gap)


def check_constraints(problem: Problem, options: Mapping[str, Any]) -> None:
    """Make sure, before any error is known, that each block can keep what the options ask of it.

    Raises:
        BudgetError: it cannot.
    """
    constraints = constraints_of(problem, options)
    if constraints.any:
        reachable_blocks(*problem.in_units(problem.flat_curves()), constraints)


def constraints_of(problem: Problem, options: Mapping[str, Any]) -> Constraints:
    """Return the side constraints among the options of `SolverOptions`."""
    return Constraints(
        {item.path: item.block for item in problem.items},
        {item.path: item.bits // problem.unit for item in problem.items},
        options["monotone"],
        options["block_floor"],
        options["block_cap"],
        problem.noun,
    )
