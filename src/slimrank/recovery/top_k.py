"""Distributions by their k most probable tokens and the mass of all others, and the divergence from them.

With the tail as one event there are k + 1. KL over these events is at most KL over all tokens, since merging events
never raises a divergence (data-processing inequality: Cover and Thomas, *Elements of Information Theory*, section 2.8).
The difference is the tail's mass times the divergence inside the tail. With k = vocabulary it is KL over all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

STORED = torch.float16  # rounds log-probabilities above -2 by 0.0005 at most, and those above -16 by 0.004
BYTES_OF_TOKEN, BYTES_OF_TAIL = 6, 4


@dataclass(frozen=True)
class TopK:
    """Distributions of next tokens, in natural logarithms; leading dimensions are positions.

    Attributes:
        top: log-probabilities of the most probable tokens (... x k).
        tokens: which these are (... x k, int32).
        tail: logarithm of the mass of all other tokens (...); -inf where there are none.
    """

    top: Tensor
    tokens: Tensor
    tail: Tensor

    @classmethod
    def of(cls, logits: Tensor, k: int) -> TopK:
        """Return the k most probable tokens of each position, and the mass of the others, in float32 or wider.

        Args:
            logits: positions x vocabulary.
            k: at most the size of the vocabulary.
        """
        log_p = log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
        top, tokens = log_p.topk(k, dim=-1)
        return cls(top, tokens.int(), log_p.scatter(-1, tokens, -inf).logsumexp(-1))

    def part(self, rows: slice) -> TopK:
        """Return some of the positions."""
        return TopK(self.top[rows], self.tokens[rows], self.tail[rows])

    def flat(self) -> TopK:
        """Return all positions of all windows one after the other."""
        return TopK(self.top.flatten(0, -2), self.tokens.flatten(0, -2), self.tail.flatten())

    def divergence(self, log_q: Tensor, weights: Tensor, slope: Tensor) -> Tensor:
        """Return the weighted sum over positions of the KL of k + 1 events, and add its gradient to `slope`.

        The gradient by the logits is q - r: r is p for the k tokens, and q scaled to the mass of p in the tail.

        Args:
            log_q: logarithms of the other distributions (positions x vocabulary), which have the gradient.
            weights: of the positions.
            slope: gradient by the logits behind `log_q`, of its shape.
        """
        tokens = self.tokens.long()
        log_p = torch.cat([self.top.to(log_q.dtype), self.tail[:, None].to(log_q.dtype)], 1)
        log_p = log_softmax(log_p, 1)  # rounded ones add up to one again
        rest = log_q.scatter(1, tokens, -inf)
        log_tail = rest.logsumexp(1, keepdim=True)
        p = log_p.exp()
        shift = torch.where(p[:, -1:] > 0, log_p[:, -1:] - log_tail, -inf)
        aimed = rest.add_(shift).exp_().scatter_(1, tokens, p[:, :-1])
        slope.add_(log_q.exp().sub_(aimed).mul_(weights[:, None]))
        difference = log_p - torch.cat([log_q.gather(1, tokens), log_tail], 1)
        return (torch.where(p > 0, p * difference, 0).sum(1).double() * weights).sum()


def bytes_of(positions: int, k: int) -> int:
    """Return the bytes that so many positions take on disk."""
    return positions * (k * BYTES_OF_TOKEN + BYTES_OF_TAIL)
