"""Draw the windows of a run for each use, from one text or from the model itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimrank.text.overlap import windows_found
from slimrank.text.windows import draw_apart, draw_spread, draw_windows


@dataclass(frozen=True)
class Draws(ABC):
    """Where windows come from.

    Attributes:
        samples: windows that calibrate.
        apart: number of windows of each use that overlap neither those that calibrate nor those of another such use.
        seq_len: tokens of a window.
        seed: the same windows for the same seed.
    """

    samples: int
    apart: Sequence[int]
    seq_len: int
    seed: int

    @abstractmethod
    def calibration(self) -> Tensor:
        """Draw windows that calibrate (samples x seq_len)."""

    @abstractmethod
    def kept_apart(self) -> tuple[list[Tensor], bool]:
        """Draw windows of each use in `apart`; tell whether there was room for all."""

    @abstractmethod
    def refinement(self, count: int) -> Tensor:
        """Draw up to that many windows to refine on (... x seq_len), none of them a held-out window."""

    @abstractmethod
    def holds(self, windows: Tensor) -> Tensor:
        """Tell which of other windows (without BOS) are found in the text."""


@dataclass(frozen=True)
class FromText(Draws):
    """Windows of a text; `tokens` are those of the whole."""

    tokens: Tensor
    bos: int | None

    def calibration(self) -> Tensor:  # noqa: D102
        return draw_windows(self.tokens, self.samples, self.seq_len, self.seed, self.bos)

    def kept_apart(self) -> tuple[list[Tensor], bool]:  # noqa: D102
        return draw_apart(self.tokens, self.apart, self.samples, self.seq_len, self.seed, self.bos)

    def refinement(self, count: int) -> Tensor:  # noqa: D102
        return draw_spread(self.tokens, count, (self.apart, self.samples), self.seq_len, self.seed, self.bos)

    def holds(self, windows: Tensor) -> Tensor:  # noqa: D102
        return windows_found(windows, self.tokens)


@dataclass(frozen=True)
class FromModel(Draws):
    """Windows that the model samples: `sampled(count, seq_len, seed)`."""

    sampled: Callable[[int, int, int], Tensor]

    def calibration(self) -> Tensor:  # noqa: D102
        return self.sampled(self.samples, self.seq_len, self.seed)

    def kept_apart(self) -> tuple[list[Tensor], bool]:  # noqa: D102
        return list(self.sampled(sum(self.apart), self.seq_len, self.seed + 1).split(tuple(self.apart))), True

    def refinement(self, count: int) -> Tensor:  # noqa: D102
        return self.sampled(count, self.seq_len, self.seed + 2)

    def holds(self, windows: Tensor) -> Tensor:  # noqa: D102
        return torch.zeros(len(windows), dtype=torch.bool)
