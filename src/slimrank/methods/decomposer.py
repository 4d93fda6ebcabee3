"""The registry of decomposers. A method is one function with this decorator, in its own file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypedDict

from pydantic import BaseModel
from typing_extensions import Unpack

from slimrank.linalg.lowrank import Spectrum
from slimrank.options import known_needs, options_of, validated
from slimrank.registry import Registry
from slimrank.statistics.catalogue import NEEDS, GatherOptions, Need, Pass

Solve = Callable[..., Spectrum]


class Member(NamedTuple):
    """A target to group: its path, its shape (m, n) and its decoder block."""

    path: str
    shape: tuple[int, int]
    block: int


Solves = Literal["once", "twice", "per batch"]
Grouping = Callable[..., Sequence[Sequence[str]]]


class Traits(TypedDict, total=False):
    """Rarer arguments of `decomposer`: see `Decomposer`."""

    cost: str
    solves: Solves
    groups: Grouping | None


@dataclass(frozen=True)
class Decomposer:
    """A decomposition method.

    Attributes:
        id: its name in recipes.
        title: one line for people.
        paper: its source.
        cost: one line for people, without the pass that its needs take.
        needs: the statistics that it needs.
        solve: (weight m x n, LayerStatistics, **options) -> Spectrum. Pure; any device.
        solves: how often it solves for a weight, for the forecast of time.
        groups: (members, **options) -> paths that share one factor A, for methods whose targets share it; else None.
        options: their names, types, ranges and defaults, gathering settings included.
    """

    id: str
    title: str
    paper: str
    needs: frozenset[Need]
    solve: Solve
    options: type[BaseModel]
    cost: str = "one eigen-decomposition per weight, on its smaller side"
    solves: Solves = "once"
    groups: Grouping | None = None

    @property
    def takes(self) -> Pass:
        """Return the most expensive pass over the calibration text that its needs take."""
        passes = {NEEDS[need].takes for need in self.needs}
        return "backward" if "backward" in passes else "forward" if "forward" in passes else "none"

    def configured(self, given: Mapping[str, Any]) -> Configured:
        """Return the method with these options.

        Raises:
            RecipeError: an unknown option, or a value out of range.
        """
        chosen = validated(self.options, given, f"the method '{self.id}'").model_dump()
        settings = {name: chosen.pop(name) for name in _settings(self.needs)}
        return Configured(self, chosen, GatherOptions(needs=self.needs, **settings))


@dataclass(frozen=True)
class Configured:
    """A method with its options."""

    method: Decomposer
    options: Mapping[str, Any]
    gathering: GatherOptions

    def solve(self, weight: Any, statistics: Any) -> Spectrum:
        """Return the spectrum of a weight, given its statistics."""
        return self.method.solve(weight, statistics, **self.options)

    def groups(self, members: Iterable[Member]) -> list[list[str]]:
        """Group targets that share a factor; in most methods every target is a group by itself."""
        members = list(members)
        if self.method.groups is None:
            return [[member.path] for member in members]
        return [list(group) for group in self.method.groups(members, **self.options)]

    def described(self) -> dict[str, Any]:
        """Return all that a result depends on, for JSON."""
        gathering = self.gathering.model_dump(mode="json")
        return {"id": self.method.id, "options": dict(self.options), **gathering, "needs": sorted(gathering["needs"])}


DECOMPOSERS: Registry[Decomposer] = Registry("slimrank.methods.decompose", "decomposition method")


def decomposer(
    id: str,
    title: str,
    paper: str,
    needs: Iterable[Need] = (),
    **traits: Unpack[Traits],
) -> Callable[[Solve], Solve]:
    """Register the decorated function as the decomposer `id`.

    The function takes the weight (m x n) and its `LayerStatistics`. Its keyword-only parameters are the
    options of the method: annotate them (`Annotated[float, Field(ge=0, le=1)]` for a range) and give them defaults.

    Args:
        id: its name in recipes.
        title: one line for people.
        paper: its source.
        needs: the statistics that it needs, see `slimrank.statistics.catalogue.NEEDS`.
        traits: `cost` (one line for people, without the pass that the needs take), `solves` (once for each weight,
            twice, or once for each batch as well) and `groups` (which targets share a factor).

    Raises:
        ValueError: an unknown need.
        TypeError: an unknown trait, or an option without an annotation or a default.
    """
    asked = known_needs(needs, NEEDS)

    def register(solve: Solve) -> Solve:
        options = options_of(solve, {name: GatherOptions.model_fields[name] for name in _settings(asked)})
        DECOMPOSERS.add(Decomposer(id, title, paper, asked, solve, options, **traits))
        return solve

    return register


def _settings(needs: Iterable[Need]) -> list[str]:
    """Return the names of the gathering settings that these needs have."""
    return [name for need in sorted(needs) for name in NEEDS[need].settings]
