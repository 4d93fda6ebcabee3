"""Measure the divergence of the model from the original on held-out windows, while it is compressed block by block."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from slimrank.errors import NonFiniteError
from slimrank.methods.divergence_options import DivergenceOptions
from slimrank.models.divergence import Scorer
from slimrank.models.recording import Batch
from slimrank.models.states import HiddenState
from slimrank.pipeline.sharing import my_numbers
from slimrank.processes import Processes, processes
from slimrank.store import Store

if TYPE_CHECKING:
    from slimrank.pipeline.state import State


class HeldOutCheck:
    """The divergence of the model from the original on held-out windows.

    The windows' states follow the compressed model from block to block, so that only later blocks run. Processes share
    the windows if there is a batch for each.

    Args:
        state: has search windows, and the model.
        count: the number of search windows to use.
        store: where the original's final hidden states are stored; a resumed run has only the factorized model.
    """

    def __init__(self, state: State, count: int, store: Store) -> None:
        assert state.texts.get("search") is not None
        self.state, self.store = state, store
        self.runner = state.runner(resident=False)
        windows = state.texts["search"][:count]
        batches = [Batch(ids) for ids in windows.split(state.prepared.recipe.batch_size)]
        self._team = processes() if len(batches) >= processes().count else Processes()
        self.numbers = my_numbers(self._team, batches)
        self._batches = [batches[number] for number in self.numbers]
        self._scorer = Scorer(self.runner, 1.0, DivergenceOptions().positions(int(windows.shape[1])))
        self.states: list[HiddenState] = []

    def start(self) -> None:
        """Embed the windows, and take the original through all blocks."""
        self.runner.embed(self._batches)
        self.states = list(self.runner.states)
        if self.store.has("held-out"):
            stored, _ = self.store.load("held-out")
            self._scorer.original = [stored[str(number)] for number in self.numbers]
            return
        self._scorer.original = self._finals(0)
        if self.state.resumable:
            finals = zip(self.numbers, self._scorer.original, strict=True)
            self.store.save_parts("held-out", {str(number): final for number, final in finals})

    def divergence(self, index: int) -> float:
        """Return the divergence from the original in nats a token, the model from block `index` on as it is now.

        It is infinite if the model no longer computes finite numbers.
        """
        parts = self._team.all((self._divergence(index), sum(len(batch.input_ids) for batch in self._batches)))
        return sum(mean * windows for mean, windows in parts) / sum(windows for _, windows in parts)

    def _divergence(self, index: int) -> float:
        """Return the divergence on the windows of this process."""
        try:
            return self._scorer.score([self._finals(index)])[0][0]
        except NonFiniteError:
            return math.inf

    def step(self, index: int) -> None:
        """Take the windows through block `index` as it is now."""
        self.states = self.runner.through(self.states, index, index + 1)

    def _finals(self, index: int) -> list[Tensor]:
        return self._scorer.to_host(self.runner.finals(self.states, index))
