"""Ranks within a time: measure layers of several ranks on this machine, and spend the time as bytes are spent.

Times of single layers leave out what a whole model does to caches and memory. So the model itself is measured with
layers of random numbers instead of its own, first at one fraction for all layers, then at the ranks that were
found; what layers save in the model over what they save by themselves corrects the budget.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slimrank.budget.curves import DENSE
from slimrank.budget.problem import Allocation, Problem
from slimrank.budget.ranks import Rank
from slimrank.budget.timed import least_seconds, timed
from slimrank.errors import BudgetError
from slimrank.evaluate.speed import VOCABULARY_USED, one_round
from slimrank.models.contexts import swapped
from slimrank.models.placement import placed
from slimrank.pipeline.stages.timed_layers import TimedLayers

if TYPE_CHECKING:
    from slimrank.methods.allocator import ConfiguredAllocator
    from slimrank.pipeline.state import State

ROUNDS = 7
NEW_TOKENS = 8  # of a round of decoding
TOLERANCE = 0.02  # of the time that was asked for
TRIES = 3
SAVINGS = (0.25, 4.0)  # bounds of what layers save in the model over what they save by themselves


@dataclass(frozen=True)
class Use:
    """What is to be fast.

    Attributes:
        phase: "decode" or "prefill".
        batch: texts at once.
        tokens: of the prompt, or that are in the cache already.
    """

    phase: str
    batch: int
    tokens: int

    def inputs(self, width: int, like: Tensor) -> Tensor:
        """Return inputs of a layer."""
        length = 1 if self.phase == "decode" else self.tokens
        return torch.randn(self.batch, length, width, generator=torch.Generator().manual_seed(0)).to(like)

    def seconds(self, model: Any) -> float:
        """Measure a round of the whole model."""
        vocabulary = min(VOCABULARY_USED, model.get_input_embeddings().weight.shape[0])
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (self.batch, self.tokens), generator=draw)
        decoding = self.phase == "decode"
        prefill, decode, _ = one_round(model, ids, NEW_TOKENS if decoding else 0)
        return decode / NEW_TOKENS if decoding else prefill


@dataclass(frozen=True)
class _Try:
    """An allocation, and the seconds of the model before and with it."""

    problem: Problem
    found: Allocation
    before: float
    after: float

    def gap(self, asked: float) -> float:
        return abs(self.after / self.before / asked - 1)


class Latency:
    """Allocates within a fraction of the original's time.

    Args:
        state: holds the model, which is as before afterwards.
    """

    def __init__(self, state: State) -> None:
        recipe = state.prepared.recipe
        self.state, self.model = state, state.model
        self.use = Use(recipe.latency, recipe.latency_batch, recipe.latency_tokens)
        self.layers = TimedLayers(state, self.use.inputs)
        self.asked, self.whole = float(recipe.max_latency or 1.0), 0.0

    def spend(self, problem: Problem, allocator: ConfiguredAllocator) -> tuple[Problem, Allocation, dict[str, Any]]:
        """Return the timed problem, its allocation, and what the report says of it.

        Raises:
            BudgetError: the fastest ranks take longer.
        """
        with placed([self.model], self.state.prepared.device, upcast=False):
            self.times = self.layers.times()
            saved = self._saved(self._uniform(problem))
            tries: list[_Try] = []
            while len(tries) < (1 if allocator.measures else TRIES):
                made = timed(problem, self.times, self._budget(problem, saved))
                found = allocator.allocate(made)
                tries.append(_Try(made, found, *self._turns(found.ranks)))
                if tries[-1].gap(self.asked) < TOLERANCE:
                    break
                saved = self._factor(found.ranks, tries[-1].before, tries[-1].after)
        best = min(tries, key=lambda each: each.gap(self.asked))
        return best.problem, best.found, self._about(best.before, best.after)

    def _about(self, before: float, after: float) -> dict[str, Any]:
        use = {"phase": self.use.phase, "batch": self.use.batch, "tokens": self.use.tokens}
        use["packed"] = self.state.prepared.recipe.packed
        return {**use, "asked": self.asked, "reached": after / before, "seconds": [before, after]}

    # times --------------------------------------------------------------------------------------------------

    def _turns(self, ranks: Mapping[str, Rank]) -> tuple[float, float]:
        """Measure the whole model as it is, and with layers of these ranks, in turns; ratios are those of one turn."""
        others = self.layers.stand_ins(ranks)
        rounds: list[tuple[float, float]] = []
        for _ in range(ROUNDS + 1):
            before = self.use.seconds(self.model)
            with swapped(self.model, others):
                rounds.append((before, self.use.seconds(self.model)))
        before = statistics.median(one for one, _ in rounds[1:])
        return before, before * statistics.median(other / one for one, other in rounds[1:])

    # the budget ----------------------------------------------------------------------------------------------

    def _uniform(self, problem: Problem) -> dict[str, Rank]:
        """Return for each item the largest rank that takes the asked fraction of its own time; else dense."""
        found: dict[str, Rank] = {}
        for item, (ranks, _) in zip(problem.items, problem.choices, strict=True):
            times = self.times[item.path]
            fitting = [int(r) for r in ranks if r != DENSE and times.at(int(r)) <= self.asked * times.dense]
            found[item.path] = max(fitting) if fitting else "dense"
        return found

    def _saved(self, ranks: Mapping[str, Rank]) -> float:
        return self._factor(ranks, *self._turns(ranks))

    def _factor(self, ranks: Mapping[str, Rank], before: float, after: float) -> float:
        """Return what these ranks save in the model over what they save layer by layer; remember the model's time."""
        self.whole = before
        alone = sum(self.times[path].dense - self.times[path].at(rank) for path, rank in ranks.items())
        if alone <= 0:
            return 1.0
        return min(max((before - after) / alone, SAVINGS[0]), SAVINGS[1])

    def _budget(self, problem: Problem, saved: float) -> float:
        """Return the seconds that targets may take by themselves.

        Raises:
            BudgetError: the fastest ranks take longer.
        """
        dense = sum(self.times[item.path].dense for item in problem.items)
        budget = dense - (1 - self.asked) * self.whole / saved
        least = least_seconds(timed(problem, self.times, 0.0))
        if budget < least:
            nearest = 1 - saved * (dense - least) / self.whole
            raise BudgetError(
                f"{self.use.phase} cannot take {self.asked:g} of the original's time on this machine: the fastest "
                f"ranks take {nearest:.2f}.",
                f"a max_latency of at least {ceil(nearest * 100 + 1) / 100:.2f}",
            )
        return budget
