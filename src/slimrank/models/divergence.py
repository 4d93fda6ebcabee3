"""How far the predictions of a changed model are from those of the original, from final hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from slimrank.models.blocks import BlockRunner
from slimrank.models.gradients import (
    Bypass,
    frozen,
    gradient_of,
    logits_of,
    part_of,
    rows_of,
    through_head,
)
from slimrank.models.recording import Batch
from slimrank.models.states import HiddenState

CACHED = 2**18  # numbers: of a CPU's cache
AT_ONCE = 2**26  # numbers: 256 MB of float32, on an accelerator
NEAR = 1e-2  # nats: rounding of float32 is a hundred thousandth of it


class Scorer:
    """Compares final hidden states with those of the original model, through the output head.

    Both run in the same precision. Logits are computed for a few windows at a time, the original's once for all
    comparisons, and never stored.

    Args:
        runner: has embedded the windows to compare on.
        temperature: logits are divided by it for the divergence (not for the likelihood).
        dropped: leading positions of each window that do not count.
    """

    def __init__(self, runner: BlockRunner, temperature: float, dropped: int) -> None:
        self.runner, self.temperature, self.dropped = runner, temperature, dropped
        self.original: list[Tensor] = []

    def to_host(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """Return the part of final hidden states that must be stored: the positions that count."""
        return [self.runner.windows(h, slice(None), self.dropped).contiguous() for h in hidden]

    def score(self, finals: Sequence[Sequence[Tensor]]) -> list[tuple[float, float]]:
        """Return the divergence from the original and the negative log-likelihood, in nats a token, of each final.

        KL(original || changed) of the next-token distributions, over the positions that count. NaN or infinity is
        passed on.
        """
        sums = torch.zeros(len(finals), 2, dtype=torch.float64)
        counts = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad(), through_head(self.runner) as bypass:
            for ids, parts in self._parts(finals):
                expected = log_softmax(self._logits(bypass, ids, parts[0]) / self.temperature, dim=-1)
                for index, part in enumerate(parts[1:]):
                    logits = self._logits(bypass, ids, part)
                    sums[index, 0] += _divergence(expected, logits, self.temperature)
                    sums[index, 1] += _likelihood(logits, ids)
                counts += torch.tensor([ids.numel(), ids[:, 1:].numel()])
        return [(float(kl), float(nll)) for kl, nll in sums / counts]

    def _parts(self, finals: Sequence[Sequence[Tensor]]) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Yield token ids and hidden states, the original's first, of some windows at a time."""
        for b, batch in enumerate(self.runner.batches):
            ids = batch.input_ids[:, self.dropped :]
            for part in rows_of(Batch(ids), self.runner.model):
                yield ids[part], [self.runner.windows(hidden[b], part) for hidden in (self.original, *finals)]

    def _logits(self, bypass: Bypass, ids: Tensor, hidden: Tensor) -> Tensor:
        bypass.final = hidden.to(self.runner.device)
        return logits_of(self.runner.model, Batch(ids), self.runner.device).float()


def divergence(log_p: Tensor, log_q: Tensor) -> float:
    """Return KL(p || q), summed over all distributions (..., vocabulary); both in float32.

    With d = log q - log p it is -sum p d, where rounding errors of d count in full. If it is small, use
    sum p (e^d - 1 - d): no term is negative, and those errors count by their squares. Where p is almost 0, q is added
    instead, since e^d might be too large for float32.
    """
    p = log_p.exp()
    never = p < torch.finfo(p.dtype).tiny
    d = (log_q - log_p).masked_fill_(never, 0)
    found = -(p * d).sum(dim=-1)
    near = found < NEAR
    if bool(near.any()):
        terms = torch.expm1(d).sub_(d).clamp_(min=0).mul_(p)
        if bool(never.any()):
            terms += log_q.exp() * never
        found = torch.where(near, terms.sum(dim=-1), found)
    return float(found.cpu().double().sum())


def _divergence(expected: Tensor, logits: Tensor, temperature: float) -> float:
    """Return KL of softmax(logits / temperature) from distributions with the logarithms `expected`, a few at a time."""
    parts = zip(positions(expected), positions(logits), strict=True)
    return sum(divergence(log_p, log_softmax(z / temperature, dim=-1)) for log_p, z in parts)


def _likelihood(logits: Tensor, ids: Tensor) -> float:
    """Return the negative log-likelihood of the tokens after the first, summed."""
    norms = torch.cat([z.logsumexp(dim=-1) for z in positions(logits)]).view(ids.shape)
    picked = logits[:, :-1].gather(-1, ids[:, 1:, None].to(logits.device))[..., 0]
    return float((norms[:, :-1].cpu().double() - picked.cpu().double()).sum())


def positions(x: Tensor) -> Sequence[Tensor]:
    """Split all positions (batch x tokens x vocabulary) into parts that are quick to compute and take little memory."""
    flat = x.flatten(0, 1)
    return flat.split(max(1, (CACHED if x.device.type == "cpu" else AT_ONCE) // x.shape[-1]))


def divergence_gradients(
    runner: BlockRunner, final: Sequence[Tensor], original: Sequence[Tensor]
) -> tuple[list[HiddenState], float]:
    """Return KL(original || changed) of the next-token distributions, summed over all positions, and its gradients.

    Args:
        runner: has embedded its batches, which are not padded.
        final: output of the changed model's last block, one for each batch.
        original: that of the original model.

    Returns:
        Gradients by the state after the last block, one for each batch, and the sum in nats.

    Raises:
        NonFiniteError: the divergence of a batch is NaN or infinite.
        ModelError: the model gives no logits, or they do not depend on its blocks.
    """
    gradients: list[HiddenState] = []
    total = 0.0
    with through_head(runner) as bypass, frozen(runner.model):
        for b, batch in enumerate(runner.batches):
            parts = []
            for rows in rows_of(batch, runner.model):
                part = part_of(batch, rows)
                bypass.final = runner.windows(original[b], rows).to(runner.device)
                with torch.no_grad():
                    expected = log_softmax(logits_of(runner.model, part, runner.device).float(), dim=-1)
                bypass.final = runner.windows(final[b], rows).to(runner.device).detach().requires_grad_()
                with torch.enable_grad():
                    found = log_softmax(logits_of(runner.model, part, runner.device).float(), dim=-1)
                    loss = kl_div(found, expected, reduction="sum", log_target=True)
                parts.append(gradient_of(loss, bypass.final, runner.model, b))
                total += _divergence(expected, found.detach(), 1.0)
            gradients.append(runner.to_host(HiddenState(runner.joined(parts))))
    return gradients, total
