"""From a recipe and the targets of a model to a rank plan and a forecast: shared by `compress` and `preview`."""

from __future__ import annotations

from typing import Any

from slimrank.allocate.budget import budget_in_parameters
from slimrank.allocate.plan import RankPlan
from slimrank.allocate.registry import ALLOCATORS
from slimrank.estimate import Workload
from slimrank.models.structure import parameters_of
from slimrank.models.targets import TargetSet
from slimrank.recipe import Recipe

HEADER_BYTES = 160  # of a safetensors file, per tensor: more than any name and shape take


def make_plan(recipe: Recipe, model: Any, targets: TargetSet, itemsize: int) -> RankPlan:
    """The plan that the recipe names, checked against the model, or one by its allocation.

    Raises:
        PlanError: the plan does not fit the model.
        BudgetError: no choice of ranks meets the budget.
    """
    shapes = {t.path: t.shape for t in targets}
    if recipe.plan is not None:
        plan = recipe.plan if isinstance(recipe.plan, RankPlan) else RankPlan.load(recipe.plan)
        plan.check(shapes)
        return plan
    headers = HEADER_BYTES * (len(list(model.parameters())) + len(targets) + 2)
    budget = budget_in_parameters(
        targets.coverage.targets,
        targets.coverage.total,
        itemsize,
        recipe.keep_ratio,
        recipe.keep_total,
        recipe.max_bytes - headers if recipe.max_bytes is not None else None,
    )
    allocator = ALLOCATORS.get(recipe.allocation)
    return RankPlan.build(allocator.allocate(shapes, budget, recipe.rank_multiple), shapes, allocator.id, budget)


def workload(model: Any, targets: TargetSet, calibration_tokens: int, evaluation_tokens: int) -> Workload:
    """What a compression of the model will compute."""
    head = model.get_output_embeddings()
    return Workload(
        targets=targets.targets,
        matrices=targets.coverage.matrices,
        head=parameters_of(head) if head is not None else 0,
        calibration_tokens=calibration_tokens,
        evaluation_tokens=evaluation_tokens,
    )
