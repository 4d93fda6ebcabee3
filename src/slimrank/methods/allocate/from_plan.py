"""Ranks from a plan file."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from slimrank.budget.curves import DENSE
from slimrank.budget.problem import Allocation, Problem
from slimrank.budget.rank_plan import RankPlan
from slimrank.budget.ranks import Rank
from slimrank.errors import BudgetError, PlanError
from slimrank.methods.allocator import allocator

File = Annotated[str, Field(description="JSON, as 'slimrank plan --save' and every compressed model's plan.json.")]


@allocator(
    id="from_plan",
    title="Ranks from a plan file",
    paper="any plan, made by hand or by another run",
)
def from_plan(problem: Problem, *, file: File = "plan.json") -> Allocation:
    """Read the ranks of a file, which must name every target, be chosen for this form, and meet the budget.

    Raises:
        PlanError: no such file, not a plan, ranks for another form of factors, other targets, shapes or shared factors,
            or ranks that are not candidates.
        BudgetError: the plan stores more than the budget.
    """
    plan = RankPlan.load(file)
    _check_form(plan, problem, file)
    targets = [(path, shape, item.path) for item in problem.items for path, shape in item.targets.items()]
    shares = {path: first for path, _, first in targets if path != first}
    plan.check({path: shape for path, shape, _ in targets}, shares)
    ranks: dict[str, Rank] = {item.path: plan.targets[item.path].rank for item in problem.items}
    for item, (candidates, _) in zip(problem.items, problem.choices, strict=True):
        rank = ranks[item.path]
        if (DENSE if rank == "dense" else rank) not in candidates:
            raise PlanError(
                f"the plan '{file}' gives '{item.path}' rank {rank}, which it may not have here.",
                "another --rank-multiple or --rank; 'slimrank plan --save' makes one that fits",
            )
    cost = sum(problem.bits(item, ranks[item.path]) for item in problem.items)
    if cost > problem.budget:
        raise BudgetError(
            f"the plan '{file}' stores {problem.counted(cost):,} {problem.noun}, over the budget of "
            f"{problem.counted(problem.budget):,}.",
            f"{problem.needed(cost)}; or --plan {file}, which is its own budget",
        )
    return Allocation(ranks)


def _check_form(plan: RankPlan, problem: Problem, file: str) -> None:
    """Refuse ranks of another form, whose cost differs: as pairs the ranks of pivot layers may exceed the weight."""
    if plan.cost_model != problem.form.name:
        raise PlanError(
            f"the ranks of the plan '{file}' were chosen for form {plan.cost_model}, not {problem.form.name}.",
            f"--form {plan.cost_model}; or --plan {file}, which follows the form",
        )
