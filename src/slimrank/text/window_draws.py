"""Draw the windows of a run for each use: from one text, from the model itself, or from a mixture of these."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimrank.text.mixtures import Part, interleaved, shares
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
        return self._sampled(self.samples, 0)

    def kept_apart(self) -> tuple[list[Tensor], bool]:  # noqa: D102
        return list(self._sampled(sum(self.apart), 1).split(tuple(self.apart))), True

    def refinement(self, count: int) -> Tensor:  # noqa: D102
        return self._sampled(count, 2)

    def holds(self, windows: Tensor) -> Tensor:  # noqa: D102
        return torch.zeros(len(windows), dtype=torch.bool)

    def _sampled(self, count: int, use: int) -> Tensor:
        if not count:
            return torch.empty(0, self.seq_len, dtype=torch.long)
        return self.sampled(count, self.seq_len, self.seed + use)


@dataclass(frozen=True)
class FromMixture(Draws):
    """Windows of several parts by their shares; `draws` are those of each part, for its own numbers of windows."""

    parts: Sequence[Part]
    draws: Sequence[Draws]

    def calibration(self) -> Tensor:  # noqa: D102
        return interleaved([draws.calibration() for draws in self.draws])

    def kept_apart(self) -> tuple[list[Tensor], bool]:  # noqa: D102
        found = [draws.kept_apart() for draws in self.draws]
        uses = zip(*(windows for windows, _ in found), strict=True)
        return [interleaved(use) for use in uses], all(apart for _, apart in found)

    def refinement(self, count: int) -> Tensor:  # noqa: D102
        counts = shares(count, self.parts)
        return interleaved([draws.refinement(n) for draws, n in zip(self.draws, counts, strict=True)])

    def holds(self, windows: Tensor) -> Tensor:  # noqa: D102
        return torch.stack([draws.holds(windows) for draws in self.draws]).any(dim=0)
