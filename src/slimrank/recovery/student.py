"""The module that is trained: a compressed model, whose output is its loss against the original."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slimrank.recovery.head import Head
from slimrank.recovery.loss import Positions, Terms, head_loss, next_tokens, relative_error
from slimrank.recovery.top_k import TopK


class Trained(nn.Module):
    """A module that gives its own loss. In training only adapters drop inputs, as the original drops nothing."""

    def train(self, mode: bool = True) -> Trained:
        """Set the mode of training."""
        super().train(mode)
        for name, module in self.named_modules():
            module.training = mode and (
                module is self or "lora_dropout" in name or getattr(module, "gradient_checkpointing", False)
            )
        return self

    def broken(self, input_ids: Tensor) -> str:
        """Name the first part whose output is not finite for these inputs, in words; nothing where it is not known."""
        return ""


class Student(Trained):
    """Gives the mean loss over the positions that count.

    Args:
        model: the compressed model.
        teacher: the original, or its head; it is neither trained nor saved. None where only labels count.
        terms: weights of divergence and labels.
        hidden: weight of the relative squared error of the states after each block.
    """

    def __init__(self, model: Any, teacher: Any, terms: Terms, hidden: float = 0.0) -> None:
        super().__init__()
        self.model, self.terms, self.hidden = model, terms, hidden
        known = teacher is None or isinstance(teacher, Head)
        self._heads: tuple[Head, Head | None] = (Head(model), teacher if known else Head(teacher))

    def broken(self, input_ids: Tensor) -> str:
        """See `Trained`: the first block."""
        mine, _ = self._heads
        with torch.no_grad():
            states = mine.states(input_ids, wanted=True)
        found = next((i for i, state in enumerate(states) if not bool(torch.isfinite(state).all())), None)
        return "" if found is None else f"; the output of '{mine.path}.{found}' is not"

    def forward(
        self,
        input_ids: Tensor,
        counted: Tensor,
        final: Tensor | None = None,
        top: Tensor | None = None,
        tokens: Tensor | None = None,
        tail: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the loss of windows.

        Args:
            input_ids: the windows (batch x tokens).
            counted: marks the positions whose prediction counts.
            final: the original's states after its last block (batch x tokens x width), where they are known.
            top: its most probable tokens' log-probabilities (batch x tokens x k), where they are stored: see `TopK`.
            tokens: which these are.
            tail: logarithm of the mass of all others (batch x tokens).
        """
        mine, teacher = self._heads
        states = mine.states(input_ids, wanted=self.hidden > 0)
        stored = None if top is None or tokens is None or tail is None else TopK(top, tokens, tail).flat()
        aims = [] if stored else self._aims(input_ids) if final is None else [final]
        original = aims[-1].flatten(0, 1) if aims else None
        weights = counted.flatten().float()
        positions = Positions(original, next_tokens(input_ids).flatten(), weights, stored)
        total = head_loss(mine, teacher, self.terms, states[-1].flatten(0, 1), positions)
        loss = total / weights.sum().clamp(min=1)
        if self.hidden and aims:
            errors = [relative_error(*pair) for pair in zip(states, aims, strict=True)]
            loss = loss + self.hidden * torch.stack(errors).mean()
        return {"loss": loss}

    @torch.no_grad()
    def _aims(self, ids: Tensor) -> list[Tensor]:
        """Return the states of the original that count, the final ones last; none without an original."""
        _, teacher = self._heads
        return [] if teacher is None else teacher.states(ids, wanted=self.hidden > 0)
