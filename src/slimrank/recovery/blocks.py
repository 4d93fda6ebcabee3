"""Students of single blocks, and the hidden states that enter them in both models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slimrank.models.blocks import BlockRunner
from slimrank.models.contexts import evaluating
from slimrank.models.recording import Batch
from slimrank.models.states import HiddenState
from slimrank.recovery.loss import relative_error
from slimrank.recovery.student import Trained
from slimrank.recovery.trainer import Windows


class BlockWork:
    """Two streams of hidden states, those of the original and those of the trained model, up to the next block.

    All states of the text are in memory, and one block of each model on the device.

    Args:
        model: the compressed model.
        teacher: the original.
        text: windows to train on, and held-out ones.
    """

    def __init__(self, model: Any, teacher: Any, text: tuple[Windows, Windows], device: torch.device) -> None:
        self.text, self.device, self.index = text, device, 0
        batches = [Batch(ids[None]) for part in text for ids in part.ids]
        self.student, self.teacher = (BlockRunner(m, device, upcast=False, resident=False) for m in (model, teacher))
        with torch.no_grad():
            for runner in (self.student, self.teacher):
                with evaluating(runner.model):
                    runner.embed(batches)
        self.aims: list[HiddenState] = []

    def begin(self) -> tuple[nn.Module, tuple[Windows, Windows]]:
        """Return the student of the next block, and the numbers of windows instead of their tokens."""
        self.before = list(self.teacher.states)
        with torch.no_grad(), evaluating(self.teacher.model):
            self.teacher.step(self.index)
        self.aims = list(self.teacher.states)
        self.student.blocks[self.index].to(self.device)
        count = len(self.text[0])
        numbers = torch.arange(count + len(self.text[1]))[:, None]
        halves = (numbers[:count], numbers[count:])
        marked = tuple(Windows(some, part.counted) for some, part in zip(halves, self.text, strict=True))
        return BlockStudent(self, self.index), (marked[0], marked[1])

    def end(self) -> None:
        """Take the states of the trained model through the block, as it is now."""
        with torch.no_grad(), evaluating(self.student.model):
            self.student.step(self.index)
        self.index += 1


class BlockStudent(Trained):
    """A block, whose loss is the relative squared error of its outputs, from its own inputs and from the original's."""

    def __init__(self, work: BlockWork, index: int) -> None:
        super().__init__()
        self.block, self.index, self._work = work.student.blocks[index], index, (work,)

    def broken(self, input_ids: Tensor) -> str:
        """See `Trained`: there is one block only."""
        return f" (block {self.index})"

    def forward(self, input_ids: Tensor, counted: Tensor) -> dict[str, Tensor]:
        """Return the mean loss of windows, which are given by their numbers (batch x 1)."""
        losses = [self._loss(int(number), mask) for number, mask in zip(input_ids, counted, strict=True)]
        return {"loss": torch.stack(losses).mean()}

    def _loss(self, number: int, mask: Tensor) -> Tensor:
        (work,) = self._work
        aim = work.aims[number].hidden.to(work.device).squeeze(0)[mask]
        streams = work.student.states[number], work.before[number]
        outputs = (work.student.run(self.index, number, state).hidden.squeeze(0)[mask] for state in streams)
        return torch.stack([relative_error(output, aim) for output in outputs]).mean()
