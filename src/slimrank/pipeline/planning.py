"""From a recipe and the targets of a model to a rank plan and a forecast: shared by `compress` and `preview`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import gcd
from typing import Any

import numpy as np

from slimrank.budget.curves import Limits
from slimrank.budget.problem import Allocation, Item, Problem
from slimrank.budget.proportional import ranks_from_fractions
from slimrank.budget.rank_plan import RankPlan
from slimrank.budget.stated import BYTE_BITS, Budget
from slimrank.errors import PlanError, RecipeError
from slimrank.layers.forms import layer_form
from slimrank.methods.allocator import ALLOCATORS, ConfiguredAllocator
from slimrank.methods.decomposer import Configured, Member
from slimrank.methods.refiner import REFINERS, ConfiguredRefiner
from slimrank.models.structure import find_blocks, parameters_of
from slimrank.models.targets import Target, TargetSet, matches, role_of
from slimrank.pipeline.forecast import Workload, group_widths
from slimrank.pipeline.model_bytes import ModelBytes, new_biases
from slimrank.recipe import Recipe


@dataclass(frozen=True)
class Unit:
    """Targets that are decomposed together, since they share the factor A; mostly a single one."""

    targets: tuple[Target, ...]

    @property
    def path(self) -> str:
        """The path of the first, under which the unit goes."""
        return self.targets[0].path

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the stacked weight."""
        return sum(t.shape[0] for t in self.targets), self.targets[0].shape[1]

    @property
    def blocks(self) -> set[int]:
        """The decoder blocks that its targets live in."""
        return {t.block for t in self.targets}


def configured_refiner(recipe: Recipe, method: Configured) -> ConfiguredRefiner | None:
    """The refiner that the recipe names, with its options.

    Raises:
        RecipeError: an unknown refiner or option, a value out of range, options without a refiner, or a refiner that
            does not go with the method, the batch size or the number of windows.
    """
    if recipe.refine is None:
        if recipe.refine_options:
            raise RecipeError("refine_options are given, but no refiner.", "--refine update, regress or ada_comp")
        return None
    refiner = REFINERS.get(recipe.refine).configured(recipe.refine_options)
    if refiner.refiner.changes_a and method.method.groups:
        raise RecipeError(
            f"the refiner '{recipe.refine}' changes factors that '{recipe.method}' shares between layers.",
            "--refine update leaves them alone",
        )
    halves = refiner.following.ridge == "auto"
    windows = recipe.samples * refiner.following.samples_factor
    largest = min(recipe.batch_size, windows // 2) if halves else recipe.batch_size
    if refiner.following.stack_of_batch > max(1, largest):
        raise RecipeError(
            f"stack_of_batch averages windows of one batch; a batch has {largest}.",
            f"--batch-size {refiner.following.stack_of_batch}, and twice as many --samples with ridge=auto",
        )
    if halves and windows < 2:
        raise RecipeError(
            "ridge=auto fits on one half of the windows what it tests on the other; there is one window.",
            "--samples 2 or more, or a number for the ridge",
        )
    return refiner


def reads_text(recipe: Recipe, method: Configured) -> bool:
    """Whether calibration text is needed."""
    return method.gathering.calibrates or recipe.refine is not None or recipe.corrections > 0


def check_corrections(recipe: Recipe, method: Configured) -> None:
    """Make sure that factors which are to be corrected belong to one layer each.

    Raises:
        RecipeError: the method shares them.
    """
    if recipe.corrections and method.method.groups:
        raise RecipeError(
            f"corrections change factors that '{recipe.method}' shares between layers.",
            "leave out --corrections, or take a method that does not share",
        )


def following_plan(recipe: Recipe) -> Recipe:
    """The recipe with the factor form of the plan that it names, if it names one.

    Raises:
        PlanError: the plan cannot be read.
        RecipeError: the recipe asks for another form.
    """
    plan = _named_plan(recipe)
    if plan is None:
        return recipe
    if recipe.factor_form == "pivot" and plan.cost_model == "pair":
        raise RecipeError("factor_form is pivot, and the plan's ranks were chosen for pairs.", "--secondary pivot")
    if recipe.secondary and plan.cost_model == "pivot":
        raise RecipeError("the plan's ranks were chosen for pivot layers already.", "leave out --secondary")
    return recipe.model_copy(
        update={"factor_form": plan.cost_model, "secondary": recipe.secondary or plan.secondary},
    )


def units_of(method: Configured, targets: TargetSet, form: str) -> list[Unit]:
    """The units that a method makes of the targets, to be stored in a form.

    Raises:
        RecipeError: the method shares factors, and finds no layers to share them between, or the form cannot share.
    """
    known = {t.path: t for t in targets}
    groups = method.groups(Member(t.path, t.shape, t.block) for t in targets)
    if method.method.groups is not None and all(len(group) == 1 for group in groups):
        raise RecipeError(
            f"'{method.method.id}' finds no layers that could share a factor.",
            "name them: --option share=[q_proj,k_proj]; or --option layers=2",
        )
    if not layer_form(form).shares and any(len(group) > 1 for group in groups):
        raise RecipeError(
            f"'{method.method.id}' shares factors between layers; pivot layers have none to share.",
            "a method that does not share, or pairs (without --factor-form and --secondary)",
        )
    return [Unit(tuple(known[path] for path in group)) for group in groups]


def _named_plan(recipe: Recipe) -> RankPlan | None:
    return RankPlan.load(recipe.plan) if isinstance(recipe.plan, str) else recipe.plan


def given_plan(recipe: Recipe, targets: TargetSet, units: Sequence[Unit]) -> RankPlan | None:
    """The plan that the recipe names, checked against the model, stored as the recipe says.

    Raises:
        PlanError: it does not fit the model.
    """
    plan = _named_plan(recipe)
    if plan is None:
        return None
    plan.check({t.path: t.shape for t in targets}, _shares(units))
    return plan.model_copy(update={"secondary": recipe.secondary})


def make_problem(recipe: Recipe, model: Any, targets: TargetSet, units: Sequence[Unit], size: ModelBytes) -> Problem:
    """What there is to allocate, without spectra.

    Raises:
        PlanError: the recipe's `ranks` leave targets that share a factor no common one.
        RecipeError: a pattern in `ranks` matches no target.
    """
    stated = _budget(recipe, model, targets, size)
    limits = _limits(recipe, [t.path for t in targets])
    widths = size.widths(stated.option)
    items = tuple(_item(unit, limits, targets.blocks_path, widths) for unit in units)
    return Problem(items, stated.bits, recipe.rank_multiple, layer_form(recipe.factor_form), stated=stated)


def _item(unit: Unit, limits: Mapping[str, Limits], blocks_path: str, widths: Mapping[str, int]) -> Item:
    first = unit.targets[0]
    members = {t.path: t.shape for t in unit.targets}
    width, role = max(widths[path] for path in members), role_of(first, blocks_path)
    return Item(unit.path, unit.shape, first.block, role, _common(unit, limits), members, width)


def _common(unit: Unit, limits: Mapping[str, Limits]) -> Limits:
    """What all targets of a unit allow. Bounds without a common rank are two that have none."""
    for one, other in combinations([t.path for t in unit.targets], 2):
        if limits[one].both(limits[other]) is None:
            raise PlanError(
                f"'ranks' leave '{one}' and '{other}', which share a factor, no common rank.",
                "bounds that overlap, or options of the method that share less",
            )
    return Limits.all_of(limits[t.path] for t in unit.targets)


def _budget(recipe: Recipe, model: Any, targets: TargetSet, size: ModelBytes) -> Budget:
    option: Any = next(name for name in ("keep_ratio", "keep_total", "max_bytes") if getattr(recipe, name) is not None)
    return Budget(
        option,
        getattr(recipe, option),
        targets=targets.coverage.targets,
        total=targets.coverage.total,
        width=BYTE_BITS * size.largest_item,
        besides=size.besides(recipe, model, targets),
        added=new_biases(recipe, (t for t in targets if not t.bias)),
        target_bits=BYTE_BITS * size.targets,
        unit=gcd(*size.widths(option).values()),
    )


def plan_of(
    allocation: Allocation, recipe: Recipe, problem: Problem, targets: TargetSet, units: Sequence[Unit]
) -> RankPlan:
    """Ranks of units as a plan of targets."""
    every = {t.path: allocation.ranks[unit.path] for unit in units for t in unit.targets}
    shapes = {t.path: t.shape for t in targets}
    widths = {path: item.width for item in problem.items for path in item.targets}
    return RankPlan.build(
        {path: every[path] for path in shapes},
        shapes,
        recipe.allocation,
        problem.budget,
        shares=_shares(units),
        cost_model=recipe.factor_form,
        secondary=recipe.secondary,
        widths=widths,
    )


def at_first(problem: Problem, allocator: ConfiguredAllocator) -> Allocation:
    """The allocation where it needs nothing else, and else provisional ranks.

    Raises:
        BudgetError: the budget, or what is asked of blocks, cannot be met.
        PlanError: limits leave a target no rank, or a plan that does not fit.
    """
    if not allocator.needs:
        return allocator.allocate(problem)
    allocator.check(problem)
    return provisional(problem)


def provisional(problem: Problem) -> Allocation:
    """Uniform ranks, for whatever needs some before the allocation is known; any feasible budget has them."""
    return Allocation(ranks_from_fractions(problem, np.zeros(len(problem.items))))


def _shares(units: Sequence[Unit]) -> dict[str, str]:
    return {t.path: unit.path for unit in units for t in unit.targets[1:]}


def _limits(recipe: Recipe, paths: Sequence[str]) -> dict[str, Limits]:
    """What ranks each target may have; of several patterns that match, the last counts."""
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


def search_passes(recipe: Recipe, layers: int) -> float:
    """Forward passes over the search text, about."""
    if recipe.plan is not None:
        return 0.0
    allocator = ALLOCATORS.get(recipe.allocation).configured(recipe.allocation_options)
    return allocator.passes(layers, -(-recipe.search_samples // recipe.batch_size))


def _refining(recipe: Recipe, method: Configured, refined_tokens: int, seq_len: int) -> dict[str, int]:
    """Tokens that refining reads, if anything is refined, and those on which every refined block is judged.

    The latter are judged twice, with half of the blocks on average to run.
    """
    refiner = configured_refiner(recipe, method)
    if refiner is None:
        return {}
    judged = min(refiner.following.held_out, recipe.search_samples) * seq_len
    return {"refined": refined_tokens, "held_out": judged}


def _sums(targets: TargetSet, method: Configured) -> int:
    """Numbers in the statistics of all layers."""
    if "gram" in method.gathering.needs:
        return sum(n * n for n in group_widths(targets))
    return sum(min(t.shape) ** 2 for t in targets) * (2 if method.gathering.backward else 1)


def workload(
    recipe: Recipe,
    model: Any,
    targets: TargetSet,
    method: Configured,
    calibration_tokens: int,
    refined_tokens: int,
    evaluation_tokens: int,
    seq_len: int,
) -> Workload:
    """What a compression of the model will compute."""
    head = model.get_output_embeddings()
    gathering = method.gathering
    batches = -(-recipe.samples // recipe.batch_size)
    return Workload(
        targets=targets.targets,
        matrices=targets.coverage.matrices,
        head=parameters_of(head) if head is not None else 0,
        parameters=targets.coverage.total,
        width=targets.targets[0].shape[1],
        batch_tokens=recipe.batch_size * seq_len,
        resident=recipe.resident,
        calibration_tokens=calibration_tokens,
        evaluation_tokens=evaluation_tokens,
        gathers=gathering.calibrates,
        backward=gathering.backward,
        pivots=recipe.stored_as == "pivot",
        solves={"once": 1, "twice": 2, "per batch": 1 + batches}[method.method.solves],
        search=search_passes(recipe, len(targets)) * recipe.search_samples * seq_len,
        **_refining(recipe, method, refined_tokens, seq_len),
        corrected=recipe.corrections * recipe.correction_windows * seq_len,
        rounds=recipe.corrections,
        sums=_sums(targets, method),
        bases=sum(min(unit.shape) ** 2 for unit in units_of(method, targets, recipe.stored_as)),
        blocks=len(find_blocks(model)[1]),
        samples=-(-recipe.samples // gathering.accumulate) if "gradients" in gathering.needs else 0,
    )
