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
from slimrank.store import Store

if TYPE_CHECKING:
    from slimrank.pipeline.state import State


class HeldOutCheck:
    """The divergence of the model from the original on held-out windows.

    The windows' states follow the compressed model from block to block, so that only later blocks run.

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
        self._batches = [Batch(ids) for ids in windows.split(state.prepared.recipe.batch_size)]
        self._scorer = Scorer(self.runner, 1.0, DivergenceOptions().positions(int(windows.shape[1])))
        self.states: list[HiddenState] = []

    def start(self) -> None:
        """Embed the windows, and take the original through all blocks."""
        self.runner.embed(self._batches)
        self.states = list(self.runner.states)
        if self.store.has("held-out"):
            stored, _ = self.store.load("held-out")
            self._scorer.original = [stored[str(b)] for b in range(len(self._batches))]
            return
        self._scorer.original = self._finals(0)
        if self.state.resumable:
            self.store.save("held-out", {str(b): final for b, final in enumerate(self._scorer.original)})

    def divergence(self, index: int) -> float:
        """Return the divergence from the original in nats a token, the model from block `index` on as it is now.

        It is infinite if the model no longer computes finite numbers.
        """
        try:
            return self._scorer.score([self._finals(index)])[0][0]
        except NonFiniteError:
            return math.inf

    def step(self, index: int) -> None:
        """Take the windows through block `index` as it is now."""
        self.states = self.runner.through(self.states, index, index + 1)

    def _finals(self, index: int) -> list[Tensor]:
        return self._scorer.to_host(self.runner.finals(self.states, index))
