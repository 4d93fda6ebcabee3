"""The optimisers of training: AdamW, or Muon for matrices beside AdamW for norms and biases."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

BETAS = (0.9, 0.95)  # of AdamW
MOMENTUM = 0.9  # of Muon: less than for long runs, as the first steps count here


class Together(Optimizer):
    """Several optimisers as one, each for parameters of its own.

    Args:
        parts: the optimisers; their groups are the groups of all.
    """

    def __init__(self, parts: Iterable[Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step of each."""
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the states of all."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def optimizer_of(name: str, model: nn.Module, rate: float) -> Optimizer:
    """Return an optimiser of what is trained, without decay of weights.

    "muon" makes each step of a matrix orthogonal (Jordan et al., 2024), as large as steps of AdamW at that rate usually
    are (Liu et al., Muon is Scalable for LLM Training, arXiv 2502.16982, section 2.2). Other parameters get AdamW.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim == 2 and name == "muon"]
    others = [p for p in trained if p.ndim != 2 or name != "muon"]
    parts: list[Optimizer] = []
    if matrices:
        muon: Any = torch.optim.Muon
        parts.append(muon(matrices, lr=rate, weight_decay=0.0, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"))
    if others:
        parts.append(AdamW(others, lr=rate, betas=BETAS, weight_decay=0.0))
    return parts[0] if len(parts) == 1 else Together(parts)
