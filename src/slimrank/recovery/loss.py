"""The divergence from the original at every position, through the output head a few positions at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from slimrank.recovery.head import Head
from slimrank.recovery.top_k import TopK

LOGITS_AT_ONCE = 2**26  # elements, that go through the head together: autocast casts its weight each time
IN_CACHE = 2**20  # elements
NO_LABEL = -100


@dataclass(frozen=True)
class Positions:
    """Final states and what they are compared with, position by position.

    Attributes:
        original: final states of the original (positions x width); None where its distributions are stored, and where
            only labels count.
        labels: the next token of each position, -100 where there is none.
        weights: of the positions.
        stored: distributions of the original, shortened; None where they are computed.
    """

    original: Tensor | None
    labels: Tensor
    weights: Tensor
    stored: TopK | None = None

    def part(self, rows: slice) -> Positions:
        """Return some of the positions."""
        original = None if self.original is None else self.original[rows]
        stored = None if self.stored is None else self.stored.part(rows)
        return Positions(original, self.labels[rows], self.weights[rows], stored)


@dataclass(frozen=True)
class Terms:
    """What is added up over positions: kl KL(original || student) + label (negative log-likelihood of the next token).

    Attributes:
        kl: weight of the divergence.
        label: weight of the likelihood.
    """

    kl: float = 1.0
    label: float = 0.0

    def total_and_gradient(self, student: Tensor, aims: Positions, original: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the weighted sum over positions, and its gradient by the logits of the student.

        By hand, a few positions at a time and in place where possible: autograd would pass over logits in float32 a
        dozen times, and they do not fit into a cache.

        Args:
            student: logits (positions x vocabulary).
            aims: labels and weights of the positions, and stored distributions of the original.
            original: logits of the original; None where its distributions are stored, and where only labels count.
        """
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        gradient, wide = torch.empty_like(student), torch.promote_types(student.dtype, torch.float32)
        for rows in slices(len(student), max(1, IN_CACHE // student.shape[1])):
            log_q = log_softmax(student[rows], -1, dtype=wide)
            slope = torch.zeros_like(log_q)
            if original is not None:
                total += self._divergence(log_q, original[rows], aims.weights[rows], slope)
            if aims.stored is not None:
                total += aims.stored.part(rows).divergence(log_q, self.kl * aims.weights[rows], slope)
            if self.label:
                total += self._likelihood(log_q, aims.labels[rows], aims.weights[rows], slope)
            gradient[rows] = slope
        return total, gradient

    def _divergence(self, log_q: Tensor, original: Tensor, weights: Tensor, slope: Tensor) -> Tensor:
        """Return the weighted KL(original || student), and add its gradient, q - p, to `slope`."""
        log_p, weights = log_softmax(original, -1, dtype=log_q.dtype), self.kl * weights[:, None]
        p = log_p.exp()
        slope.add_(log_q.exp().sub_(p).mul_(weights))
        return (log_p.sub_(log_q).mul_(p).sum(-1).double() * weights[:, 0]).sum()

    def _likelihood(self, log_q: Tensor, labels: Tensor, weights: Tensor, slope: Tensor) -> Tensor:
        """Return the weighted negative log-likelihood, and add its gradient, q - 1 at the label, to `slope`."""
        weights = (self.label * weights * labels.ne(NO_LABEL))[:, None].to(log_q)
        labels = labels.clamp(min=0)[:, None]
        slope.add_(log_q.exp().mul_(weights)).scatter_add_(1, labels, -weights)
        return -(log_q.gather(1, labels).double() * weights).sum()


def slices(length: int, step: int) -> Iterator[slice]:
    """Cut a length into slices of at most `step`."""
    for start in range(0, length, step):
        yield slice(start, start + step)


def positions_at_once(vocabulary: int) -> int:
    """Return how many positions go through the head together."""
    return max(1, LOGITS_AT_ONCE // vocabulary)


def next_tokens(ids: Tensor) -> Tensor:
    """Return the next token of each position (batch x tokens), -100 after the last."""
    return torch.cat([ids[:, 1:], ids.new_full((len(ids), 1), NO_LABEL)], dim=1)


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
        for rows in slices(len(final), positions_at_once(student.vocabulary)):
            part, mine = positions.part(rows), final[rows].detach().requires_grad_(wanted)
            with torch.no_grad():
                aim = None if teacher is None or part.original is None else teacher.logits(part.original)
            with torch.set_grad_enabled(wanted):
                logits = student.logits(mine)
            sum_of_part, by_logits = terms.total_and_gradient(logits.detach(), part, aim)
            total += sum_of_part
            if by_final is not None:
                by_final[rows], *found = torch.autograd.grad(logits, (mine, *trained), by_logits, allow_unused=True)
                for held, new in zip(by_trained, found, strict=True):
                    if new is not None:
                        held += new
        if by_final is not None:
            ctx.save_for_backward(by_final, *by_trained)
        return total.to(torch.promote_types(final.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        by_final, *by_trained = ctx.saved_tensors
        return (by_final * upstream[0], None, *(held * upstream[0] for held in by_trained))
