"""The rank plan: target -> rank, as JSON that may be edited and passed back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from slimrank.errors import PlanError, nearest
from slimrank.linalg.cost import Rank, dense_cost, pair_cost

Shapes = Mapping[str, tuple[int, int]]


class PlannedTarget(BaseModel):
    """Rank and shape (m, n) of one target."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int | Literal["dense"]
    shape: tuple[int, int]

    @property
    def parameters(self) -> int:
        """Parameters stored at this rank."""
        return pair_cost(*self.shape, self.rank)


class RankPlan(BaseModel):
    """The rank of every target, and what it costs.

    Attributes:
        targets: module path -> rank and shape, in model order.
        cost_model: "pair" (two thin factors).
        budget: parameters that the targets together may store; None for a hand-made plan.
        allocation: which allocator made it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    cost_model: Literal["pair"] = "pair"
    allocation: str = "by hand"
    budget: int | None = None
    targets: dict[str, PlannedTarget]

    @classmethod
    def build(cls, ranks: Mapping[str, Rank], shapes: Shapes, allocation: str, budget: int) -> RankPlan:
        """A plan out of ranks and shapes by path."""
        targets = {path: PlannedTarget(rank=rank, shape=shapes[path]) for path, rank in ranks.items()}
        return cls(allocation=allocation, budget=budget, targets=targets)

    @property
    def parameters(self) -> int:
        """Parameters that the targets store."""
        return sum(t.parameters for t in self.targets.values())

    @property
    def dense_parameters(self) -> int:
        """Parameters of the targets before compression."""
        return sum(dense_cost(*t.shape) for t in self.targets.values())

    @property
    def keep_ratio(self) -> float:
        """Fraction of the targets' parameters that is kept."""
        return self.parameters / self.dense_parameters

    def factored(self) -> dict[str, int]:
        """Targets that are factored, and their ranks; the others stay dense."""
        return {path: t.rank for path, t in self.targets.items() if t.rank != "dense"}

    def check(self, shapes: Shapes) -> None:
        """Make sure that the plan fits a model with targets of these shapes.

        Raises:
            PlanError: unknown or missing targets, other shapes, impossible ranks, or more than the budget.
        """
        for path, target in self.targets.items():
            if path not in shapes:
                raise PlanError(f"the plan names '{path}', which is no target of the model.", nearest(path, shapes))
            if target.shape != tuple(shapes[path]):
                raise PlanError(
                    f"'{path}' is {target.shape} in the plan and {tuple(shapes[path])} in the model.", _MAKE
                )
            if target.rank != "dense" and not 1 <= target.rank <= min(target.shape):
                raise PlanError(f"rank {target.rank} of '{path}' is outside 1..{min(target.shape)}.", 'or "dense"')
        missing = [path for path in shapes if path not in self.targets]
        if missing:
            raise PlanError(f"the plan lacks {len(missing)} targets, e.g. '{missing[0]}'.", _MAKE)
        if self.budget is not None and self.parameters > self.budget:
            raise PlanError(
                f"the plan stores {self.parameters:,} parameters, over its budget of {self.budget:,}.",
                "lower some ranks, or raise or remove 'budget' in the file",
            )

    def save(self, path: Path) -> None:
        """Write the plan as JSON.

        Raises:
            PlanError: the file cannot be written.
        """
        try:
            path.write_text(json.dumps(self.model_dump(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise PlanError(f"the plan '{path}' cannot be written: {error.strerror}.", "another place") from error

    @classmethod
    def load(cls, path: str | Path) -> RankPlan:
        """Read a plan from JSON.

        Raises:
            PlanError: no such file, or not a plan.
        """
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(
                f"the plan '{path}' cannot be read: {error.strerror}.", "slimrank plan MODEL --save FILE"
            ) from error
        except (ValidationError, UnicodeDecodeError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
            where = ".".join(map(str, first["loc"])) or "the file"
            raise PlanError(
                f"'{path}' is no rank plan: {where}: {first['msg']}.", "slimrank plan MODEL --save FILE"
            ) from error


_MAKE = "make a plan for this very model: slimrank plan MODEL --save FILE"
