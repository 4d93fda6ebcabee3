"""What storing all targets in one form would take and lose, beside a plan that gives each its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from slimrank.budget.menu import Menu
from slimrank.budget.ranks import Rank
from slimrank.budget.stated import BYTE_BITS


@dataclass(frozen=True)
class Alternative:
    """One form for all targets that have a choice.

    Attributes:
        form: its name.
        rank: of the form.
        size: bytes of all targets.
        error: predicted loss, in the unit of the energies.
    """

    form: str
    rank: Rank
    size: int
    error: float


def alternatives(menus: Mapping[str, Menu], energies: Mapping[str, float]) -> list[Alternative]:
    """Return every form, with its rank, that all targets can have, smallest first.

    Args:
        menus: of all targets.
        energies: of their outputs; before they are known, anything.
    """
    rows = [_by_form(menu, energies[path]) for path, menu in menus.items()]
    free = [row for row in rows if len(row) > 1]  # the others stay as they are
    shared = [key for key in (free[0] if free else {}) if all(key in row for row in free)]
    kept = sum(cost for row in rows if len(row) == 1 for cost, _ in row.values())
    found = [_total(form, rank, [row[form, rank] for row in free], kept) for form, rank in shared if form is not None]
    return sorted(found, key=lambda each: (each.size, each.error))


def form_and_rank(alternative: Mapping[str, Any]) -> str:
    """Return the form and the rank of an alternative in words."""
    rank = alternative["rank"]
    return str(alternative["form"]) if rank == "dense" else f"{alternative['form']}, rank {rank}"


def _by_form(menu: Menu, energy: float) -> dict[tuple[str | None, Rank], tuple[int, float]]:
    """Return cost and loss of each candidate."""
    each = zip(menu.candidates, (energy * menu.errors()).tolist(), strict=True)
    return {(candidate.form, candidate.rank): (candidate.cost, error) for candidate, error in each}


def _total(form: str, rank: Rank, found: Iterable[tuple[int, float]], kept: int) -> Alternative:
    costs, errors = zip(*found, strict=True)
    return Alternative(form, rank, ceil((sum(costs) + kept) / BYTE_BITS), sum(errors))
