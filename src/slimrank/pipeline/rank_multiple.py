"""The multiple that ranks should have on a device, measured: what `rank_multiple: auto` stands for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import nn

from slimrank.layers.forms import layer_form
from slimrank.layers.stand_ins import stand_in
from slimrank.models.targets import Target
from slimrank.models.timing import layer_seconds

MULTIPLES = (1, 2, 4, 8, 16, 32, 64)
CHOICES = 8  # ranks that a multiple must leave to every shape that is measured
SHARE = 0.1  # of the targets' parameters that a shape must have to be measured
TOKENS = (1, 256)  # of a step of decoding, and of a prompt
SLOWER = 0.03  # of the time between two good ranks: less is not worth coarser ranks

Shape = tuple[int, int]


def measured_multiple(targets: Iterable[Target], form: str, dtype: torch.dtype, device: torch.device) -> int:
    """Return the smallest multiple whose ranks run about as fast as those of the largest multiple that leaves choices.

    Measured are layers of the most frequent shapes, for one token and for many.

    Args:
        targets: what will be compressed.
        form: of the layers.
        dtype: of their weights.
        device: what runs them.
    """
    shares = shares_of_shapes(targets)
    largest = {shape: layer_form(form).largest_rank(*shape) for shape in shares}
    allowed = [multiple for multiple in MULTIPLES if multiple * CHOICES <= min(largest.values())]
    if len(allowed) < 2:
        return 1
    excess = np.zeros((len(TOKENS), len(allowed) - 1))
    for shape, share in shares.items():
        ranks = ranks_between(largest[shape], allowed)
        layers = _Layers(shape, ranks, form, dtype, device, torch.get_num_threads())
        for row, tokens in zip(excess, TOKENS, strict=True):
            row += share * excess_over_line(ranks, _seconds(layers, tokens))
    return chosen_multiple(allowed, excess.max(axis=0))


def shares_of_shapes(targets: Iterable[Target]) -> dict[Shape, float]:
    """Return the shapes that many parameters have, and their shares of these."""
    counted: Counter[Shape] = Counter()
    for target in targets:
        counted[target.shape] += target.parameters
    whole = counted.total()
    many: Mapping[Shape, int] = {shape: n for shape, n in counted.items() if n >= SHARE * whole} or counted
    return {shape: n / sum(many.values()) for shape, n in many.items()}


def ranks_between(largest: int, allowed: Sequence[int]) -> tuple[int, ...]:
    """Return two multiples of the last of `allowed`, and between them, for each other one, a rank that no next divides.

    Args:
        largest: the largest rank, at least `CHOICES` times the last of `allowed`.
        allowed: powers of 2, ascending.
    """
    *others, top = allowed
    base = largest // 2 // top * top
    return (base - top, *(base - multiple for multiple in others), base)


def excess_over_line(ranks: Sequence[int], seconds: Sequence[float]) -> np.ndarray:
    """Return how much more time the inner ranks take than a straight line between the first and the last says."""
    line = np.interp(ranks, (ranks[0], ranks[-1]), (seconds[0], seconds[-1]))
    return (np.array(seconds) / line - 1)[1:-1]


def chosen_multiple(allowed: Sequence[int], excess: Sequence[float] | np.ndarray) -> int:
    """Return the smallest multiple that no slow one is as large as.

    Args:
        allowed: powers of 2, ascending.
        excess: of all but the last of them, over the time of the last.
    """
    slow = [multiple for multiple, more in zip(allowed, excess, strict=False) if more > SLOWER]
    return 2 * max(slow) if slow else allowed[0]


@dataclass(frozen=True)
class _Layers:
    """The layers that are measured: their shape and ranks, and what runs them."""

    shape: Shape
    ranks: tuple[int, ...]
    form: str
    dtype: torch.dtype
    device: torch.device
    threads: int


@cache
def _seconds(layers: _Layers, tokens: int) -> list[float]:
    m, n = layers.shape
    like = nn.Linear(n, m, bias=False, dtype=layers.dtype, device=layers.device)
    x = torch.randn(1, tokens, n, generator=torch.Generator().manual_seed(0)).to(like.weight)
    return layer_seconds([stand_in(layers.form, like, rank) for rank in layers.ranks], x)
