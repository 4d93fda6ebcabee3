"""A recipe resolved once: first by itself, then for a model, with weights or without.

`compress`, `plan`, `compare` and `doctor` all start from here, so that one refuses what the others refuse.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from slimrank.budget.problem import Allocation, Problem
from slimrank.budget.rank_plan import RankPlan
from slimrank.checkpoint.save import check_loadable
from slimrank.layers.forms import layer_form
from slimrank.methods.allocator import ALLOCATORS, ConfiguredAllocator
from slimrank.methods.decomposer import DECOMPOSERS, Configured
from slimrank.methods.refiner import REFINERS, ConfiguredRefiner
from slimrank.models.fused_layers import split_layers
from slimrank.models.placement import resolve_device, solving_device
from slimrank.models.precision import autocasts
from slimrank.models.storage import stored_dtype
from slimrank.models.targets import TargetSet, find_targets
from slimrank.pipeline.model_bytes import ModelBytes
from slimrank.pipeline.rank_multiple import measured_multiple
from slimrank.pipeline.rank_problem import (
    adopt_plan_form,
    given_plan,
    initial_allocation,
    make_problem,
    plan_of,
)
from slimrank.pipeline.stage import Stage, stages_of
from slimrank.pipeline.units import Unit, units_of
from slimrank.processes import by_leader
from slimrank.recipe import Recipe
from slimrank.text.texts import WindowRequest, window_length


@dataclass(frozen=True)
class Choices:
    """A recipe and its methods with their options; no model is known yet.

    Attributes:
        recipe: with the form of the plan that it names, if it names one.
        method: the decomposition method.
        allocator: what finds the ranks.
        refiner: what refines the factors; None without one.
        stages: what the recipe asks for, in order, except writing.
    """

    recipe: Recipe
    method: Configured
    allocator: ConfiguredAllocator
    refiner: ConfiguredRefiner | None
    stages: tuple[Stage, ...] = ()

    @classmethod
    def of(cls, recipe: Recipe) -> Choices:
        """Resolve a recipe, and let its stages check it.

        Raises:
            RecipeError: an unknown method or option, a value out of range, or choices that cannot be combined.
            PlanError: a plan that cannot be read.
        """
        made = cls(
            adopt_plan_form(recipe),
            DECOMPOSERS.get(recipe.method).configured(recipe.method_options),
            ALLOCATORS.get(recipe.allocation).configured(recipe.allocation_options),
            REFINERS.get(recipe.refine).configured(recipe.refine_options) if recipe.refine is not None else None,
        )
        return replace(made, stages=stages_of(made))

    @property
    def requests(self) -> list[WindowRequest]:
        """Return the text windows that all stages ask for."""
        return [request for stage in self.stages for request in stage.windows(self)]

    @property
    def measures(self) -> bool:
        """Tell whether the allocation measures the model on text."""
        return self.recipe.plan is None and self.allocator.measures

    @property
    def computes_ranks(self) -> bool:
        """Tell whether ranks depend on spectra or measurements."""
        return self.recipe.plan is None and bool(self.allocator.needs)

    @property
    def reads_text(self) -> bool:
        """Tell whether factorizing needs calibration text; a measured allocation may need more text."""
        recipe = self.recipe
        return self.method.gathering.calibrates or recipe.refine is not None or recipe.corrections > 0

    @property
    def differentiates(self) -> bool:
        """Tell whether something takes gradients of the model."""
        descends = self.recipe.plan is None and "gradient" in self.allocator.needs
        return self.method.gathering.backward or self.recipe.corrections > 0 or descends


@dataclass(frozen=True)
class Prepared:
    """A recipe resolved for a model, whose weights may be on the meta device.

    Attributes:
        choices: the recipe's methods.
        recipe: with the length of a window, and the multiple of ranks.
        model: its fused layers are taken apart.
        targets: the weights to compress.
        units: the targets that are decomposed together.
        size: bytes of the model as it is.
        problem: the rank problem; None if the recipe names a plan.
        plan: the plan that is given or known already, else provisional ranks.
        unfused: whether any fused layer was taken apart.
        dtype: the dtype that the model is stored in.
    """

    choices: Choices
    recipe: Recipe
    model: Any
    targets: TargetSet
    units: list[Unit]
    size: ModelBytes
    problem: Problem | None
    plan: RankPlan
    unfused: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, choices: Choices, model: Any) -> Prepared:
        """Resolve a recipe for a model, in which fused layers are taken apart.

        Raises:
            SlimrankError: anything that does not fit: windows, patterns, budget, plan, or the model itself.
        """
        unfused = bool(split_layers(model, choices.recipe.split))
        recipe = choices.recipe.model_copy(update={"seq_len": window_length(model, choices.recipe.seq_len)})
        targets = find_targets(model, recipe.targets, recipe.ignore, layer_form(recipe.form))
        if recipe.rank_multiple == "auto":
            recipe = _with_multiple(recipe, model, targets)
        check_loadable(model)
        size = ModelBytes.of(model, targets)
        units = units_of(choices.method, targets, recipe.stored_as)
        plan, problem = given_plan(recipe, targets, units), None
        if plan is None:
            problem = make_problem(recipe, model, targets, units, size)
            plan = plan_of(
                initial_allocation(problem, choices.allocator, recipe.max_latency), recipe, problem, targets, units
            )
        made = cls(choices, recipe, model, targets, units, size, problem, plan, unfused, stored_dtype(model))
        for stage in choices.stages:
            stage.check_model(made)
        return made

    @cached_property
    def device(self) -> torch.device:
        """Return the device that computes."""
        return resolve_device(self.recipe.device)

    @cached_property
    def solver(self) -> torch.device:
        """Return the device that solves in float64."""
        return solving_device(self.device)

    @cached_property
    def upcast(self) -> bool:
        """Tell whether blocks are computed in float32, whatever their stored dtype."""
        narrow = self.choices.differentiates and self.dtype == torch.float16
        return self.device.type == "cpu" or self.recipe.compute_dtype != "auto" or narrow

    @cached_property
    def bfloat16(self) -> bool:
        """Tell whether blocks compute their products in bfloat16, by autocast."""
        return autocasts(self.recipe.compute_dtype, self.device)

    def about_multiple(self, multiple: int | str | None = None) -> list[str]:
        """Return a note on the multiple of ranks, if it was measured; that of the recipe, unless one is given."""
        if self.choices.recipe.rank_multiple != "auto":
            return []
        return [f"ranks are multiples of {multiple or self.recipe.rank_multiple}: measured on {self.device}"]

    @property
    def compute(self) -> str:
        """Return the precision of blocks, as keys of the run directory name it."""
        stored = str(self.dtype).removeprefix("torch.")
        return "autocast" if self.bfloat16 else "float32" if self.upcast else stored

    @property
    def backwards(self) -> bool:
        """Tell whether calibration takes the blocks from the last to the first."""
        return self.choices.method.gathering.backward and not self.recipe.resident

    def plan_of(self, allocation: Allocation) -> RankPlan:
        """Return an allocation as a plan of all targets."""
        assert self.problem is not None
        return plan_of(allocation, self.recipe, self.problem, self.targets, self.units)


def _with_multiple(recipe: Recipe, model: Any, targets: TargetSet) -> Recipe:
    """Return the recipe with the multiple of ranks that suits the device."""
    dtype, device = stored_dtype(model), resolve_device(recipe.device)
    found = by_leader(lambda: measured_multiple(targets.targets, recipe.stored_as, dtype, device))
    return recipe.model_copy(update={"rank_multiple": found})
