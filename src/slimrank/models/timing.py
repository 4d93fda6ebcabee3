"""Seconds that layers take on this machine."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor, nn

COPIES_BYTES = 2**26  # of weights that are read in turn, so that none of them waits in a cache
MAX_COPIES = 32
ROUNDS = 7


def layer_seconds(layers: Sequence[nn.Module], x: Tensor) -> list[float]:
    """Measure a call of each layer on inputs x (... x in), in turns; its weights come from memory, not from a cache."""
    several = [_copies(layer) for layer in layers]
    rounds: list[list[float]] = [[] for _ in layers]
    with torch.no_grad():
        for _ in range(ROUNDS + 1):
            for times, copies in zip(rounds, several, strict=True):
                start = time.perf_counter()
                for layer in copies:
                    layer(x)
                if x.device.type != "cpu":
                    torch.accelerator.synchronize(x.device)
                times.append((time.perf_counter() - start) / len(copies))
    return [statistics.median(times[1:]) for times in rounds]


def _copies(layer: nn.Module) -> list[nn.Module]:
    size = sum(p.numel() * p.element_size() for p in layer.parameters())
    count = min(MAX_COPIES, ceil(COPIES_BYTES / max(1, size)))
    return [layer, *(copy.deepcopy(layer) for _ in range(count - 1))]
