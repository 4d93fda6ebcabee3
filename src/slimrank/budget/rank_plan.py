"""The rank plan: target -> rank, as JSON that may be edited and passed back."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, StrictInt, ValidationError, model_validator

from slimrank.errors import PlanError, nearest
from slimrank.linalg.cost import COST_MODELS, FactorForm, Rank, dense_cost

Shapes = Mapping[str, tuple[int, int]]


class PlannedTarget(BaseModel):
    """Rank and shape (m, n) of one target, and the target whose factor A it shares, if any."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: StrictInt | Literal["dense"]
    shape: tuple[StrictInt, StrictInt]
    shares: str | None = None

    def cost(self, form: FactorForm) -> int:
        """Parameters that a form stores at this rank; a shared A is counted where it belongs, once."""
        shared = self.rank * self.shape[1] if self.shares is not None and self.rank != "dense" else 0
        return COST_MODELS[form].of(*self.shape, self.rank) - shared


class RankPlan(BaseModel):
    """The rank of every target, and what it costs.

    Attributes:
        targets: module path -> rank and shape, in model order.
        cost_model: what the ranks were chosen for: "pair" (two thin factors), or "pivot" (see `linalg.pivot`), which
            is then stored, too.
        secondary: "pivot" stores ranks that were chosen for pairs as that.
        budget: parameters that the targets together may store; None for a hand-made plan.
        allocation: which allocator made it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    cost_model: FactorForm = "pair"
    secondary: Literal["pivot"] | None = None
    allocation: str = "by hand"
    budget: int | None = None
    targets: dict[str, PlannedTarget]

    @classmethod
    def build(
        cls,
        ranks: Mapping[str, Rank],
        shapes: Shapes,
        allocation: str,
        budget: int,
        shares: Mapping[str, str] | None = None,
        cost_model: FactorForm = "pair",
        secondary: Literal["pivot"] | None = None,
    ) -> RankPlan:
        """A plan out of ranks and shapes by path, and the targets whose A others share."""
        targets = {
            path: PlannedTarget(rank=rank, shape=shapes[path], shares=(shares or {}).get(path))
            for path, rank in ranks.items()
        }
        return cls(allocation=allocation, budget=budget, targets=targets, cost_model=cost_model, secondary=secondary)

    @model_validator(mode="after")
    def _one_way(self) -> RankPlan:
        if self.secondary and self.cost_model == "pivot":
            raise ValueError("'secondary' is for ranks whose cost_model is pair")
        return self

    @property
    def stored_as(self) -> FactorForm:
        """What the factored targets become."""
        return self.secondary or self.cost_model

    @property
    def parameters(self) -> int:
        """Parameters of the targets under the cost model: what the budget bounds."""
        return sum(t.cost(self.cost_model) for t in self.targets.values())

    @property
    def stored_parameters(self) -> int:
        """Parameters that the targets store: fewer, where ranks chosen for pairs are stored as pivot layers."""
        return sum(t.cost(self.stored_as) for t in self.targets.values())

    @property
    def dense_parameters(self) -> int:
        """Parameters of the targets before compression."""
        return sum(dense_cost(*t.shape) for t in self.targets.values())

    @property
    def keep_ratio(self) -> float:
        """Fraction of the targets' parameters that is kept."""
        return self.stored_parameters / self.dense_parameters

    def factored(self) -> dict[str, int]:
        """Targets that are factored, and their ranks; the others stay dense."""
        return {path: t.rank for path, t in self.targets.items() if t.rank != "dense"}

    def check(self, shapes: Shapes, shares: Mapping[str, str] | None = None) -> None:
        """Make sure that the plan fits a model with targets of these shapes, and a method that shares these factors.

        Raises:
            PlanError: unknown or missing targets, other shapes, impossible ranks, or more than the budget.
        """
        shares = shares or {}
        missing = [path for path in shapes if path not in self.targets]
        if missing:
            raise PlanError(f"the plan lacks {len(missing)} targets, e.g. '{missing[0]}'.", _MAKE)
        for path, target in self.targets.items():
            if path not in shapes:
                raise PlanError(f"the plan names '{path}', which is no target of the model.", nearest(path, shapes))
            if target.shape != tuple(shapes[path]):
                raise PlanError(
                    f"'{path}' is {target.shape} in the plan and {tuple(shapes[path])} in the model.", _MAKE
                )
            if target.shares != shares.get(path):
                raise PlanError(
                    f"'{path}' shares the factor of {target.shares or 'no other'} in the plan, and of "
                    f"{shares.get(path) or 'no other'} in the method.",
                    "make the plan with the same --method and options",
                )
            if target.shares and target.rank != self.targets[target.shares].rank:
                raise PlanError(f"'{path}' has another rank than '{target.shares}', whose factor it shares.", _SAME)
            leader = shares.get(path, path)
            rows = sum(shapes[p][0] for p in (leader, *(p for p in shares if shares[p] == leader)))
            largest = min(rows, target.shape[1])
            if target.rank != "dense" and not 1 <= target.rank <= largest:
                raise PlanError(f"rank {target.rank} of '{path}' is outside 1..{largest}.", 'or "dense"')
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
            raise _unwritable(path, error.strerror) from error

    @classmethod
    def load(cls, path: str | Path) -> RankPlan:
        """Read a plan from JSON.

        Raises:
            PlanError: no such file, or not a plan.
        """
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8-sig"))
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


def check_place(path: Path) -> None:
    """Make sure, before any work, that a plan can be written there.

    Raises:
        PlanError: it cannot.
    """
    folder = path.absolute().parent
    if os.path.isdir(path):
        raise _unwritable(path, os.strerror(errno.EISDIR))
    if not os.path.isdir(folder):
        raise _unwritable(path, os.strerror(errno.ENOTDIR if os.path.exists(folder) else errno.ENOENT))
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise _unwritable(path, os.strerror(errno.EACCES))


def _unwritable(path: Path, reason: str | None) -> PlanError:
    return PlanError(f"the plan '{path}' cannot be written: {reason}.", "another place")


_SAME = "give all targets that share a factor one rank"
_MAKE = "make a plan for this very model: slimrank plan MODEL --save FILE"
