"""The rank plan: target -> rank, as JSON that may be edited and passed back."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator
from typing_extensions import TypedDict, Unpack

from slimrank.budget.planned_target import PlannedTarget, known_form
from slimrank.budget.ranks import Rank
from slimrank.errors import PlanError, nearest

Shapes = Mapping[str, tuple[int, int]]


class PlanTraits(TypedDict, total=False):
    """What a plan may say besides ranks and a budget.

    Attributes:
        shares: target -> the target whose factor A it shares.
        cost_model: what the ranks were chosen for.
        secondary: another form that they are stored in.
        widths: target -> bits of a number of its weight, which the budget counts in; without it, it counts parameters.
        forms: target -> its own form, where it is another one than that of the plan.
    """

    shares: Mapping[str, str]
    cost_model: str
    secondary: str | None
    widths: Mapping[str, int]
    forms: Mapping[str, str]


class RankPlan(BaseModel):
    """The rank of every target, and what it costs.

    Attributes:
        targets: module path -> rank and shape, in model order.
        cost_model: what the ranks were chosen for: "pair" (two thin factors), "pivot" (see `linalg.pivot`), or another
            form, which is then stored, too.
        secondary: another form, e.g. "pivot", which ranks that were chosen for pairs are stored in.
        budget: parameters that the targets together may store, or bits where targets have a width; None for a hand-made
            plan.
        allocation: which allocator made it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    cost_model: str = "pair"
    secondary: str | None = None
    allocation: str = "by hand"
    budget: int | None = None
    targets: dict[str, PlannedTarget]

    @classmethod
    def build(
        cls,
        ranks: Mapping[str, Rank],
        shapes: Shapes,
        allocation: str,
        budget: int | None,
        **traits: Unpack[PlanTraits],
    ) -> RankPlan:
        """Make a plan.

        Where all widths are one, and the form stores every number in it, the plan counts in parameters.

        Args:
            ranks: target -> rank.
            shapes: target -> (m, n).
            allocation: which allocator made it.
            budget: bits that the targets together may store, or parameters without widths; None for another budget.
            traits: see `PlanTraits`.
        """
        shares, widths, forms = traits.get("shares") or {}, traits.get("widths") or {}, traits.get("forms") or {}

        def planned(path: str, rank: Rank) -> PlannedTarget:
            mine = shares.get(path), widths.get(path), forms.get(path)
            return PlannedTarget(rank=rank, shape=shapes[path], shares=mine[0], width=mine[1], form=mine[2])

        targets = {path: planned(path, rank) for path, rank in ranks.items()}
        form, secondary = traits.get("cost_model", "pair"), traits.get("secondary")
        plan = cls(allocation=allocation, budget=budget, targets=targets, cost_model=form, secondary=secondary)
        return plan.in_parameters()

    @field_validator("cost_model", "secondary")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        return name if name is None else known_form(name)

    @model_validator(mode="after")
    def _one_way(self) -> RankPlan:
        if self.secondary and self.cost_model != "pair":
            raise ValueError("'secondary' is for ranks whose cost_model is pair")
        return self

    def in_parameters(self) -> RankPlan:
        """Return the same plan with a budget in parameters, where bits are so many times as many; else this one."""
        widths = {target.width for target in self.targets.values()}
        width = widths.pop() if len(widths) == 1 else None
        whole = width and all(t.bits(self.cost_model) == t.cost(self.cost_model) * width for t in self.targets.values())
        if not width or not whole or (self.budget is not None and self.budget % width):
            return self
        targets = {path: target.model_copy(update={"width": None}) for path, target in self.targets.items()}
        budget = None if self.budget is None else self.budget // width
        return self.model_copy(update={"targets": targets, "budget": budget})

    @property
    def stored_as(self) -> str:
        """What the factored targets become."""
        return self.secondary or self.cost_model

    @property
    def parameters(self) -> int:
        """Parameters of the targets under the cost model."""
        return sum(t.cost(self.cost_model) for t in self.targets.values())

    @property
    def bits(self) -> int:
        """What the budget bounds: bits of the targets under the cost model, or parameters where they have no width."""
        return sum(t.bits(self.cost_model) for t in self.targets.values())

    @property
    def stored_parameters(self) -> int:
        """Parameters that the targets store: fewer, where ranks chosen for pairs are stored as pivot layers."""
        return sum(t.cost(self.stored_as) for t in self.targets.values())

    @property
    def dense_parameters(self) -> int:
        """Parameters of the targets before compression."""
        return sum(t.shape[0] * t.shape[1] for t in self.targets.values())

    @property
    def keep_ratio(self) -> float:
        """Fraction of the targets' parameters that is kept."""
        return self.stored_parameters / self.dense_parameters

    @property
    def kept_bits(self) -> float:
        """Fraction of the targets' bits that is kept, where the budget is in bits; else of their parameters."""
        if not self.quantized():
            return self.keep_ratio
        return self.bits / sum(t.shape[0] * t.shape[1] * (t.width or 1) for t in self.targets.values())

    def factored(self) -> dict[str, int]:
        """Return the ranks of the targets that are factored; the others stay dense."""
        return {path: t.rank for path, t in self.targets.items() if t.rank != "dense" and not t.keeps_weight}

    def form_of(self, path: str) -> str:
        """Return the form that a target is stored in."""
        target = self.targets[path]
        return target.form or (self.stored_as if target.rank != "dense" else "dense")

    def quantized(self) -> dict[str, str]:
        """Return the forms of the targets whose weights become integers."""
        return {path: t.form for path, t in self.targets.items() if t.form and t.is_quantized}

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
                raise PlanError(f"the plan names '{path}', which is not a target of the model.", nearest(path, shapes))
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
        if self.budget is not None and self.bits > self.budget:
            noun = "bits" if any(t.width for t in self.targets.values()) else "parameters"
            raise PlanError(
                f"the plan stores {self.bits:,} {noun}, over its budget of {self.budget:,}.",
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
                f"'{path}' is not a rank plan: {where}: {first['msg']}.", "slimrank plan MODEL --save FILE"
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
