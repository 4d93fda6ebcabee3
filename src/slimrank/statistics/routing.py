"""Which tokens of a batch a router sends to which expert."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from slimrank.layers.experts import Experts


@dataclass
class Routing:
    """Listens to the arguments of modules of experts.

    Attributes:
        experts: path of a layer -> the module of experts that it belongs to, and the number of its expert.
    """

    experts: dict[str, tuple[Experts, int]] = field(default_factory=dict)

    @classmethod
    def among(cls, model: nn.Module, paths: Iterable[str]) -> Routing:
        """Return the routing of those layers that belong to an `Experts`."""
        found = {}
        for path in paths:
            holder, _, number = path.rpartition(".")
            experts = model.get_submodule(holder.rpartition(".")[0])
            if isinstance(experts, Experts) and number.isdigit():
                found[path] = experts, int(number)
        return cls(found)

    def __post_init__(self) -> None:
        self._arguments: dict[int, tuple[Any, ...]] = {}
        self._numbers: dict[tuple[int, int], Tensor] = {}

    def watch(self) -> list[Any]:
        """Register the hooks that listen; return their handles."""
        modules = {id(experts): experts for experts, _ in self.experts.values()}
        return [experts.register_forward_pre_hook(self._hear, with_kwargs=True) for experts in modules.values()]

    def numbers(self, path: str) -> Tensor | None:
        """Return the tokens of a layer's input rows, in order; None if they are unknown."""
        if path not in self.experts:
            return None
        experts, number = self.experts[path]
        place = id(experts), number
        if place not in self._numbers:
            self._numbers[place] = experts.sent(number, *self._arguments[id(experts)])[0]
        return self._numbers[place]

    def _hear(self, experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._arguments[id(experts)] = (*args, *kwargs.values())[:2]
        self._numbers = {place: found for place, found in self._numbers.items() if place[0] != id(experts)}
