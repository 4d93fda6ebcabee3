"""Share the work of a compression between processes: batches of text, and weights to solve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slimrank.errors import RecipeError
from slimrank.processes import Processes, processes

if TYPE_CHECKING:
    from slimrank.models.blocks import Batch
    from slimrank.pipeline.units import Unit
    from slimrank.statistics.catalogue import GatherOptions

WHOLE = {"gradients", "projectors"}  # needs that cannot be summed over parts of the text


def shares_text(gathering: GatherOptions) -> bool:
    """Tell whether the statistics of a method can be summed over parts of the text."""
    return not gathering.needs & WHOLE


def team_of(gathering: GatherOptions) -> Processes:
    """Return the processes that share the calibration text; each reads all of it where sums would not do."""
    return processes() if shares_text(gathering) else Processes()


def my_numbers(team: Processes, batches: Sequence[Batch]) -> range:
    """Return the numbers of the batches that this process runs.

    Raises:
        RecipeError: there are fewer batches than processes.
    """
    if 0 < len(batches) < team.count:
        raise RecipeError(
            f"{team.count} processes cannot share {len(batches)} batches of text.",
            "a smaller --batch-size, more --samples, or fewer processes",
        )
    numbers = team.mine(range(len(batches)))
    assert isinstance(numbers, range)
    return numbers


def my_units(units: Sequence[Unit], team: Processes) -> list[Unit]:
    """Return the units that this process solves: the costliest first, each to whoever has least to do.

    An eigen-problem of the smaller side and products with the weight cost min(m, n)^2 max(m, n).
    """
    loads, mine = [0] * team.count, []
    for unit in sorted(units, key=_cost, reverse=True):
        owner = loads.index(min(loads))
        loads[owner] += _cost(unit)
        if owner == team.rank:
            mine.append(unit)
    return mine


def _cost(unit: Unit) -> int:
    return min(unit.shape) ** 2 * max(unit.shape)
