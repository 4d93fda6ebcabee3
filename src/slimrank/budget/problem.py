"""What an allocator is given: targets, a budget, spectra, and a model to measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil, gcd
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from slimrank.budget.curves import Curve, Floats, Integers, Limits, candidates, spectral_curve, tails
from slimrank.budget.knapsack import check_feasible
from slimrank.budget.menu import Menu
from slimrank.budget.ranks import Rank
from slimrank.budget.stated import BYTE_BITS, Budget
from slimrank.errors import BudgetError
from slimrank.layers.forms import PAIR
from slimrank.layers.layer_form import LayerForm


@dataclass(frozen=True)
class Item:
    """What gets one rank: a target, or several that share the factor A.

    Attributes:
        path: the (first) target.
        shape: (m, n) of the stacked weight.
        block: decoder block of the first.
        role: its place in a block, numbers left out ("mlp.down_proj"): equal for layers that do the same in others.
        limits: what ranks it may have.
        members: the targets, where there are several, and their shapes.
        width: bits of a number of the dense weight; 1 counts parameters.
        dense_cost: of the dense weight, where costs are not bits.
    """

    path: str
    shape: tuple[int, int]
    block: int = 0
    role: str = ""
    limits: Limits = field(default_factory=Limits)
    members: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    width: int = 1
    dense_cost: int | None = None

    @property
    def targets(self) -> Mapping[str, tuple[int, int]]:
        """The shapes of all targets, the first one first."""
        return self.members or {self.path: self.shape}

    @property
    def parameters(self) -> int:
        """m n."""
        return self.shape[0] * self.shape[1]

    @property
    def bits(self) -> int:
        """Bits of the dense weight, or its cost in another unit."""
        return self.parameters * self.width if self.dense_cost is None else self.dense_cost


class Effect(NamedTuple):
    """What a change does to the model, on the search tokens.

    Attributes:
        kl: Kullback-Leibler divergence of the next-token distribution from the original's, in nats a token.
        nll: negative log-likelihood of the text, in nats a token.
    """

    kl: float
    nll: float


Transform = Callable[[Tensor, Tensor, slice], Tensor]  # (input, output without bias, rows of the weight) -> new output


class Probe(Protocol):
    """The model that is to be compressed, for allocators that measure it."""

    def single(self, ranks: Mapping[str, Sequence[int]]) -> Mapping[str, list[Effect]]:
        """Measure the effects of each target alone at some ranks, all others dense."""

    def joint(self, ranks: Mapping[str, Rank]) -> Effect:
        """Measure the effect of all targets at these ranks."""

    def influence(self) -> list[float]:
        """Measure for each decoder block the mean over tokens of the cosine of its input and its output."""

    def factors(self, path: str) -> tuple[Tensor, Tensor]:
        """Return A and B of a target at its full rank, float32."""

    def batches(self) -> int:
        """Tell how many batches of search tokens there are."""

    def loss(self, transforms: Mapping[str, Transform], batch: int) -> Tensor:
        """Compute the next-token loss in nats a token, differentiable by what the transforms depend on."""


@dataclass(frozen=True)
class Problem:
    """What an allocator is given.

    Attributes:
        items: in model order.
        budget: bits that they together may store.
        multiple: ranks are multiples of this.
        form: what weights are stored as.
        spectra: path -> singular values in the metric of the decomposition (float64, largest first) and the energy
            beyond them; empty for allocators that do not need them.
        probe: the model, for allocators that measure it.
        in_loss: squared singular values are in units of the loss, and can be compared between items.
        stated: the budget as it was stated, for hints; None: as a fraction of the items' parameters.
        menus: path -> what the item may become, where form, rank and bits are chosen together. What stands for ranks in
            choices and curves are then the numbers of candidates.
    """

    items: tuple[Item, ...]
    budget: int
    multiple: int = 1
    form: LayerForm = PAIR
    spectra: Mapping[str, tuple[Floats, float]] = field(default_factory=dict)
    probe: Probe | None = None
    in_loss: bool = False
    stated: Budget | None = None
    menus: Mapping[str, Menu] = field(default_factory=dict)

    @cached_property
    def sizes(self) -> Floats:
        """Bits of the dense weights."""
        return np.array([item.bits for item in self.items], dtype=np.float64)

    @cached_property
    def choices(self) -> list[tuple[Integers, Integers]]:
        """Candidate ranks of each item, and the bits that they store."""
        if self.menus:
            return [self.menus[item.path].choices for item in self.items]
        known: dict[Any, tuple[Integers, Integers]] = {}  # thousands of experts are alike
        for item in self.items:
            if (key := (item.shape, item.limits, item.width)) not in known:
                known[key] = candidates(item.path, item.shape, self.multiple, item.limits, self.form, item.width)
        return [known[item.shape, item.limits, item.width] for item in self.items]

    @cached_property
    def unit(self) -> int:
        """The most bits that divide all costs: the width of all weights, where it is one and their form keeps it."""
        every = {id(costs): costs for _, costs in self.choices}  # thousands of experts are alike
        return gcd(*(item.width for item in self.items), *(int(np.gcd.reduce(costs)) for costs in every.values()))

    @property
    def noun(self) -> str:
        """What amounts are counted in, in words."""
        return "parameters" if {item.width for item in self.items} == {self.unit} else f"numbers of {self.unit} bits"

    def counted(self, bits: float) -> int:
        """Return so many bits in units, rounded up."""
        return ceil(bits / self.unit)

    def in_units(self, curves: Sequence[Curve]) -> tuple[list[Curve], int]:
        """Return curves and the budget in units instead of bits: the same problem in smaller numbers."""
        unit = self.unit
        return [c if unit == 1 else replace(c, costs=c.costs // unit) for c in curves], self.budget // unit

    def bits(self, item: Item, rank: Rank) -> int:
        """Return the bits that an item stores at a rank."""
        return self.form.bits(*item.shape, rank, item.width)

    @property
    def keep_ratio(self) -> float:
        """Fraction of the dense weights' bits that the budget allows."""
        return self.budget / float(self.sizes.sum())

    def tail(self, item: Item, power: int = 2) -> Floats:
        """Return T(r) of a target, for r = 0 .. k."""
        values, beyond = self.spectra[item.path]
        return tails(values, beyond, item.shape, item.path, power)

    def curves(self, weights: Mapping[str, float] | None = None, power: int = 2) -> list[Curve]:
        """Return the spectral curves of all items, times their weights."""
        if self.menus:
            each = (
                (i.path, float(self.tail(i)[0]) * (1.0 if weights is None else weights[i.path])) for i in self.items
            )
            return [self.menus[path].curve(path, energy) for path, energy in each]
        return [
            spectral_curve(item.path, self.tail(item, power), *choice, 1.0 if weights is None else weights[item.path])
            for item, choice in zip(self.items, self.choices, strict=True)
        ]

    def flat_curves(self) -> list[Curve]:
        """Return curves of costs only, each cost once."""
        curves = []
        for item, (ranks, every) in zip(self.items, self.choices, strict=True):
            costs, first = np.unique(every, return_index=True)
            curves.append(Curve(item.path, ranks[first], costs, np.zeros(len(costs))))
        return curves

    def needed(self, bits: int) -> str:
        """Return the budget that allows so many bits, in the unit that it was stated in, rounded up."""
        targets = sum(item.bits for item in self.items)
        stated = self.stated or Budget("keep_ratio", self.budget / targets, targets, targets)
        return stated.needed(bits)

    def check(self, curves: Sequence[Curve] | None = None) -> None:
        """Make sure that the smallest ranks, of these curves or all that are allowed, fit into the budget.

        Raises:
            BudgetError: they do not.
            PlanError: limits leave a target no rank.
        """
        if self.menus:
            self._check_menus()
        counted, budget = self.in_units(self.flat_curves() if curves is None else curves)
        check_feasible(counted, budget, lambda count: self.needed(count * self.unit), self.noun)

    def _check_menus(self) -> None:
        """Make sure that the smallest forms fit into the budget.

        Raises:
            BudgetError: they do not.
        """
        least = sum(menu.candidates[0].cost for menu in self.menus.values())
        if least > self.budget:
            raise BudgetError(
                f"the smallest forms that the widths allow take {ceil(least / BYTE_BITS):,} bytes, and the budget "
                f"leaves {self.budget // BYTE_BITS:,}.",
                f"{self.needed(least)}; or fewer bits",
            )

    def measured(self) -> Probe:
        """Return the probe, which an allocator that asks for it has."""
        assert self.probe is not None
        return self.probe


@dataclass(frozen=True)
class Allocation:
    """What an allocator gives back.

    Attributes:
        ranks: path -> rank, for every item.
        curves: errors of single targets that it went by, if it has any, before any bias.
        divergence: these are divergences, which sums of can be compared with measured ones.
        gap: certified relative distance from the best plan for these curves.
        notes: anything to tell.
        forms: path -> form, for items that have one of their own.
        picks: path -> what stands for the rank in `curves`, where that is not the rank.
    """

    ranks: Mapping[str, Rank]
    curves: Sequence[Curve] = ()
    divergence: bool = False
    gap: float | None = None
    notes: tuple[str, ...] = ()
    forms: Mapping[str, str] = field(default_factory=dict)
    picks: Mapping[str, Rank] = field(default_factory=dict)

    @classmethod
    def from_menus(cls, menus: Mapping[str, Menu], picks: Mapping[str, Rank], **about: Any) -> Allocation:
        """Return the allocation of the candidates of these numbers, and what else there is to say of it."""
        chosen = {path: menus[path].candidates[int(pick)] for path, pick in picks.items()}
        forms = {path: candidate.form for path, candidate in chosen.items() if candidate.form is not None}
        return cls({path: candidate.rank for path, candidate in chosen.items()}, forms=forms, picks=picks, **about)
