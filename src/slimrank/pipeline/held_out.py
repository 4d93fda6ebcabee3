"""How far the model is from the original on windows kept aside, while block after block is compressed."""

from __future__ import annotations

import math

from torch import Tensor

from slimrank.allocate.measuring import Measuring
from slimrank.errors import NonFiniteError
from slimrank.models.blocks import Batch
from slimrank.models.divergence import Scorer
from slimrank.pipeline.job import Job, hidden_states, named
from slimrank.run import Stage


class HeldOut:
    """The divergence of the model from the original, blocks from some block on as they are now.

    Hidden states of the windows follow the compressed model from block to block, so that only what comes after is run.

    Args:
        job: has search windows, and the model.
        count: how many of them are used.
        stage: where the original's final hidden states are kept; the model is cut when a run goes on.
    """

    def __init__(self, job: Job, count: int, stage: Stage) -> None:
        assert job.texts.search is not None
        self.job, self.stage = job, stage
        self.runner = job.runner(resident=False)
        windows = job.texts.search[:count]
        self._batches = [Batch(ids) for ids in windows.split(job.recipe.batch_size)]
        self._scorer = Scorer(self.runner, 1.0, Measuring().positions(int(windows.shape[1])))
        self.hidden: list[Tensor] = []

    def start(self) -> None:
        """Embed the windows, and take the original through all blocks."""
        self.runner.embed(self._batches)
        self.hidden = list(self.runner.hidden)
        if self.stage.has("held-out"):
            self._scorer.original = hidden_states(self.stage.load("held-out")[0], "", len(self._batches))
            return
        self._scorer.original = self._finals(0)
        if self.job.resumable:
            self.stage.save("held-out", named("", self._scorer.original))

    def divergence(self, index: int) -> float:
        """Divergence from the original in nats a token, the model from block `index` on as it is now.

        Infinite where the model no longer computes finite numbers.
        """
        try:
            return self._scorer.score([self._finals(index)])[0][0]
        except NonFiniteError:
            return math.inf

    def step(self, index: int) -> None:
        """The windows go through block `index` as it is now."""
        self.hidden = self.runner.through(self.hidden, index, index + 1)

    def _finals(self, index: int) -> list[Tensor]:
        return self._scorer.kept(self.runner.through(self.hidden, index, len(self.runner)))
