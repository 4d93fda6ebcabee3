"""The registry of allocators. An allocator is one function with this decorator, in its own file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from pydantic import BaseModel
from typing_extensions import Unpack

from slimrank.budget.curves import DENSE
from slimrank.budget.problem import Allocation, Problem
from slimrank.errors import PlanError, RecipeError
from slimrank.methods.divergence_options import DivergenceOptions
from slimrank.methods.solver_options import SolverOptions, check_constraints
from slimrank.options import known_needs, options_of, validated
from slimrank.registry import Registry

Allocate = Callable[..., Allocation]
Passes = Callable[[Mapping[str, Any], int, int], float]
Check = Callable[[Problem, Mapping[str, Any]], None]
Need = Literal["spectra", "divergence", "influence", "gradient"]
NEEDS: dict[Need, str] = {
    "spectra": "singular values of every weight in the metric of the method",
    "divergence": "divergence of the model's predictions when targets are truncated",
    "influence": "cosine between the input and the output of each block",
    "gradient": "gradients of the loss with respect to soft ranks",
}
COSTS: dict[Need, str] = {
    "spectra": "seconds",
    "divergence": "half a forward pass over the search text for each layer and rank that is measured",
    "influence": "one forward pass over the search text",
    "gradient": "a forward and a backward pass over a batch of the search text for each step",
}


class Traits(TypedDict, total=False):
    """Rarer arguments of `allocator`: see `Allocator`."""

    passes: Passes
    check: Check
    gradient_passes: float
    joint: bool


@dataclass(frozen=True)
class Allocator:
    """A rank allocator.

    Attributes:
        id: its name in recipes.
        title: one line for people.
        paper: its source.
        needs: what it needs; see `NEEDS`. Without any, a plan can be made before anything is computed.
        allocate: (Problem, **options) -> Allocation.
        passes: (options, layers, batches of search text) -> estimated forward passes over the search text.
        options: their names, types, ranges and defaults.
        check: (Problem without spectra, options) -> None; raises if they cannot be combined.
        gradient_passes: estimated forward passes over as much text that a loss and its gradient take.
        joint: it can choose form, rank and bits together.
    """

    id: str
    title: str
    paper: str
    needs: frozenset[Need]
    allocate: Allocate
    options: type[BaseModel]
    passes: Passes = lambda options, layers, batches: 0.0
    check: Check = lambda problem, options: None
    gradient_passes: float = 7.0
    joint: bool = False

    @property
    def cost(self) -> str:
        """Describe its cost in one line for people."""
        measured = sorted(self.needs - {"spectra"})
        return "; ".join(COSTS[need] for need in measured) or "seconds"

    def configured(self, given: Mapping[str, Any]) -> ConfiguredAllocator:
        """Return the allocator with these options.

        Raises:
            RecipeError: an unknown option, or a value out of range.
        """
        chosen = validated(self.options, given, f"the allocation '{self.id}'").model_dump()
        measured = DivergenceOptions.model_fields.keys() & chosen
        measuring = DivergenceOptions(**{name: chosen.pop(name) for name in measured})
        return ConfiguredAllocator(self, chosen, measuring)


@dataclass(frozen=True)
class ConfiguredAllocator:
    """An allocator with its options."""

    allocator: Allocator
    options: Mapping[str, Any]
    measuring: DivergenceOptions

    def allocate(self, problem: Problem) -> Allocation:
        """Return ranks within the budget.

        Raises:
            BudgetError: no choice of ranks meets the budget.
            PlanError: the allocator broke its contract.
        """
        self.check(problem)
        found = self.allocator.allocate(problem, **self.options)
        _check(problem, found, self.allocator.id)
        return found

    def check(self, problem: Problem) -> None:
        """Refuse what can be refused without spectra.

        Raises:
            BudgetError: the smallest ranks store more than the budget, or a block cannot meet its constraints.
            PlanError: limits leave a target no rank.
            RecipeError: options that cannot be combined.
        """
        if problem.menus and not self.allocator.joint:
            able = ", ".join(f"--allocation {found.id}" for found in ALLOCATORS.all().values() if found.joint)
            raise RecipeError(f"the allocation '{self.allocator.id}' chooses ranks only, no bits.", able)
        if problem.menus and self.options.get("search"):
            raise RecipeError("plans of bits or times are not searched by measuring them.", "search=false")
        if self.needs:  # without any it is a fixed plan, which checks itself
            problem.check()
        self.allocator.check(problem, self.options)
        if self.options.keys() >= SolverOptions.model_fields.keys():
            check_constraints(problem, self.options)

    @property
    def needs(self) -> frozenset[Need]:
        """List what it needs."""
        return self.allocator.needs

    @property
    def measures(self) -> bool:
        """Tell whether it needs search tokens."""
        return bool(self.needs - {"spectra"})

    @property
    def gradient_passes(self) -> float:
        """Estimate how many forward passes over as much text a loss and its gradient take."""
        return self.allocator.gradient_passes

    def passes(self, layers: int, batches: int) -> float:
        """Estimate how many forward passes over the search text it takes."""
        plans = self.measuring.plans if self.allocator.needs >= {"spectra", "divergence"} else 0
        return self.allocator.passes(self.options, layers, batches) + plans

    def described(self) -> dict[str, Any]:
        """Return all that a result depends on, for JSON."""
        measuring = self.measuring.model_dump(include=set(_measuring(self.needs)))
        return {"id": self.allocator.id, **self.options, **measuring}


ALLOCATORS: Registry[Allocator] = Registry("slimrank.methods.allocate", "rank allocation")


def allocator(
    id: str,
    title: str,
    paper: str,
    needs: Iterable[Need] = (),
    solves: bool = False,
    **traits: Unpack[Traits],
) -> Callable[[Allocate], Allocate]:
    """Register the decorated function as the allocator `id`; its keyword-only parameters are its options.

    Args:
        id: its name in recipes.
        title: one line for people.
        paper: its source.
        needs: what it needs, see `NEEDS`.
        solves: it takes the options of the budget solver, as `solving`.
        traits: `passes` and `gradient_passes` for the estimate of time, `check` for what it refuses before any work,
            and `joint`: see `Allocator`.

    Raises:
        ValueError: an unknown need.
        TypeError: an unknown trait, or an option without an annotation or a default.
    """
    asked = known_needs(needs, NEEDS)

    def register(allocate: Allocate) -> Allocate:
        solving = SolverOptions.model_fields if solves else {}
        options = options_of(allocate, {**solving, **_measuring(asked)})
        ALLOCATORS.add(Allocator(id, title, paper, asked, allocate, options, **traits))
        return allocate

    return register


def _measuring(needs: frozenset[Need]) -> dict[str, Any]:
    """Return the fields of `DivergenceOptions` that matter.

    Random plans test predictions from single layers and spectra.
    """
    if "divergence" not in needs:
        return {}
    fields = DivergenceOptions.model_fields.items()
    return {name: field for name, field in fields if name != "plans" or "spectra" in needs}


def _check(problem: Problem, found: Allocation, id: str) -> None:
    """Check that any allocator meets the budget and gives every item one of its candidates."""
    wrong = {item.path for item in problem.items} ^ set(found.ranks)
    if wrong:
        raise PlanError(f"the allocation '{id}' left out, or added, '{min(wrong)}'.", _REPORT)
    cost = 0
    for item, (candidates, costs) in zip(problem.items, problem.choices, strict=True):
        rank = found.ranks[item.path]
        if problem.menus:
            cost += int(costs[int(found.picks[item.path])])
            continue
        if (DENSE if rank == "dense" else rank) not in candidates:
            raise PlanError(
                f"the allocation '{id}' gave '{item.path}' rank {rank}, which is not one of its candidates.", _REPORT
            )
        cost += problem.bits(item, rank)
    if cost > problem.budget:
        raise PlanError(
            f"the allocation '{id}' stores {problem.counted(cost):,} {problem.noun}, over "
            f"{problem.counted(problem.budget):,}.",
            _REPORT,
        )


_REPORT = "this is a bug of the allocation: report it, and use another --allocation"
