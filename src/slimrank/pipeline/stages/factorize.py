"""Factorize: replace the weights by factors of the planned ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from slimrank.budget.ranks import Rank
from slimrank.checkpoint.save import mark_model, replace_linears
from slimrank.models.page_out import page_out
from slimrank.pipeline.forecast import Cost, Shape
from slimrank.pipeline.stage import STAGES, Stage
from slimrank.pipeline.stages.spectrum_store import SpectrumStore, outline
from slimrank.pipeline.units import Unit

if TYPE_CHECKING:
    from slimrank.pipeline.prepare import Choices, Prepared
    from slimrank.pipeline.state import State


@STAGES.add
class Factorize(Stage):
    """Factorize all blocks in order; where factors are refined, the stage `refine` does both."""

    id, order, title, factorizes = "factorize", 40, "cut factors", True

    def wanted(self, choices: Choices) -> bool:
        return choices.refiner is None

    def cost(self, prepared: Prepared, shape: Shape) -> Cost:
        return Cost(float64=factorizing(prepared, shape))

    def key(self, state: State) -> dict[str, Any]:
        return {}

    def run(self, state: State) -> None:
        factorizer = Factorizer(state)
        with marked(state):
            factorizer.run(self.title)


def factorizing(prepared: Prepared, shape: Shape) -> float:
    """Count the operations of computing factors from spectra; pivot layers are decomposed again."""
    return (2 if prepared.recipe.stored_as == "pivot" else 1) * shape.decompose() / 4


@contextmanager
def marked(state: State) -> Iterator[None]:
    """Mark the model as compressed at the end, even if it is so only in part.

    Saved as a native one, a model that is factorized in part would load with random weights.
    """
    try:
        yield
    finally:
        if state.plan.factored() or not state.prepared.recipe.quantizes:
            mark_model(state.model)


class Factorizer:
    """Replace weights, unit by unit, and hold the originals until they are released.

    What the report needs goes to the results of the state.
    """

    def __init__(self, state: State) -> None:
        self.state, self.spectra = state, SpectrumStore(state)
        self.originals: dict[str, nn.Module] = {}
        self._left = list(state.prepared.units)

    def run(self, title: str) -> None:
        """Factorize all blocks in order."""
        blocks = sorted({t.block for t in self.state.prepared.targets})
        with self.state.timed(title, len(blocks)):
            for index in blocks:
                self.factorize_block(index)
                self.originals.clear()
                self.state.progress.step()

    def factorize_block(self, index: int) -> None:
        """Factorize every unit that has a target in this block."""
        now = [u for u in self._left if index in u.blocks]
        self._left = [u for u in self._left if index not in u.blocks]
        for unit in now:
            self._factorize(unit)

    def _factorize(self, unit: Unit) -> None:
        spectrum, about = self.spectra.of(unit)
        rank = self._rank(unit)
        error = 0.0 if rank == "dense" else spectrum.relative_error(rank)
        for target in unit.targets:
            self.state.results.rows[target.path] = {"relative_error": error, "group": about["groups"][target.path]}
        self.state.results.spectra[unit.path] = outline(spectrum)
        self.state.notes += [f"{unit.path}: {note}" for note in spectrum.notes]
        if rank != "dense":
            self._replace(unit, rank)

    def _rank(self, unit: Unit) -> Rank:
        """Return the rank that the weight is cut to."""
        planned = self.state.plan.targets[unit.path]
        return "dense" if planned.keeps_weight else planned.rank

    def _replace(self, unit: Unit, rank: int) -> None:
        a, parts = self.spectra.factors(unit, rank)
        for target in unit.targets:
            self.originals |= {path: self.state.model.get_submodule(path) for path in (target.path, *target.ties)}
            page_out(self.state.model.get_submodule(target.path))
        members = [((t.path, *t.ties), part) for t, part in zip(unit.targets, parts, strict=True)]
        plan = self.state.plan
        replace_linears(self.state.model, members, a, plan.targets[unit.path].base or plan.stored_as)
