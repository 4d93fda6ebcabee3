"""The divergence from the original at every position, through the output head a few positions at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from slimrank.recovery.head import Head

POSITIONS = 256  # that go through the head at once


@dataclass(frozen=True)
class Terms:
    """What is added up over positions: kl KL(original || student) + label (negative log-likelihood of the next token).

    Attributes:
        kl: weight of the divergence.
        label: weight of the likelihood.
    """

    kl: float = 1.0
    label: float = 0.0

    def of(self, student: Tensor, original: Tensor | None, labels: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum over positions.

        Args:
            student: logits (positions x vocabulary).
            original: those of the original; None where only labels count.
            labels: the next token (positions), -100 where there is none.
            weights: of the positions.
        """
        total = student.new_zeros(())
        if original is not None:
            log_p, log_q = log_softmax(original, -1), log_softmax(student, -1)
            total = total + self.kl * ((log_p.exp() * (log_p - log_q)).sum(-1) * weights).sum()
        if self.label:
            losses = cross_entropy(student, labels, reduction="none", ignore_index=-100)
            total = total + self.label * (losses * weights).sum()
        return total


@dataclass(frozen=True)
class Positions:
    """Final states and what they are compared with, position by position.

    Attributes:
        original: final states of the original (positions x width); None where only labels count.
        labels: the next token of each position, -100 where there is none.
        weights: of the positions.
    """

    original: Tensor | None
    labels: Tensor
    weights: Tensor

    def part(self, rows: slice) -> Positions:
        """Return some of the positions."""
        original = None if self.original is None else self.original[rows]
        return Positions(original, self.labels[rows], self.weights[rows])


def next_tokens(ids: Tensor) -> Tensor:
    """Return the next token of each position (batch x tokens), -100 after the last."""
    return torch.cat([ids[:, 1:], ids.new_full((len(ids), 1), -100)], dim=1)


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Return || found - wanted ||^2 / || wanted ||^2, in float32."""
    wanted = wanted.float()
    return (found.float() - wanted).square().sum() / wanted.square().sum().clamp(min=torch.finfo(torch.float32).tiny)


def head_loss(student: Head, teacher: Head | None, terms: Terms, final: Tensor, positions: Positions) -> Tensor:
    """Return the sum of the terms over positions, differentiable by the final states and the parameters of the head.

    Args:
        student: the head of the trained model.
        teacher: that of the original; None where only labels count.
        terms: what is added up.
        final: final states of the trained model (positions x width).
        positions: what they are compared with.
    """
    return _ThroughHead.apply(final, (student, teacher, terms, positions), *student.trained)


class _ThroughHead(torch.autograd.Function):
    """Computes gradients with the loss, so that the logits of one part are gone before those of the next are made."""

    @staticmethod
    def forward(ctx: Any, final: Tensor, how: tuple[Head, Head | None, Terms, Positions], *trained: Tensor) -> Tensor:
        student, teacher, terms, positions = how
        wanted = any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=torch.float64, device=final.device)
        by_final = torch.zeros_like(final) if wanted else None
        by_trained = [torch.zeros_like(p) for p in trained]
        for start in range(0, len(final), POSITIONS):
            rows = slice(start, start + POSITIONS)
            part, mine = positions.part(rows), final[rows].detach().requires_grad_(wanted)
            with torch.no_grad():
                aim = None if teacher is None or part.original is None else teacher.logits(part.original)
            with torch.set_grad_enabled(wanted):
                loss = terms.of(student.logits(mine), aim, part.labels, part.weights)
            if by_final is not None:
                by_final[rows], *found = torch.autograd.grad(loss, (mine, *trained), allow_unused=True)
                for held, new in zip(by_trained, found, strict=True):
                    if new is not None:
                        held += new
            total += loss.detach().double()
        if by_final is not None:
            ctx.save_for_backward(by_final, *by_trained)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        by_final, *by_trained = ctx.saved_tensors
        return (by_final * upstream[0], None, *(held * upstream[0] for held in by_trained))
