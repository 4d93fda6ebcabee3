"""Where and how training computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Machine:
    """Where and how training computes.

    Attributes:
        folder: for states, in which an interrupted run goes on.
        device: that computes.
        bfloat16: whether products are computed in bfloat16.
        seed: of the order of windows, and of adapters.
        report_to: trackers that transformers knows.
        teacher_again: whether the original is used again afterwards; else its blocks may lose their weights.
    """

    folder: Path
    device: torch.device
    bfloat16: bool = False
    seed: int = 0
    report_to: tuple[str, ...] = ()
    teacher_again: bool = True

    def autocast(self) -> torch.autocast:
        """Return the context in which models compute."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)
