"""Allocation problems with a model that is known exactly: errors of layers add up."""

import functools

import numpy as np
import torch

from slimrank.budget.problem import Effect, Item, Problem
from slimrank.layers.forms import PAIR

SHAPES = {"attn.q": (48, 48), "attn.k": (16, 48), "mlp.up": (96, 48), "mlp.down": (48, 96)}
BASE = 3.0  # nats a token of the original


class KnownModel:
    """Layers with diagonal spectra; KL and NLL are sums over layers of importance times energy lost.

    Layer l is W = diag(s) on the leading min(m, n) inputs, its inputs are unit vectors: cutting at rank r loses
    T(r) = sum over i > r of s_i^2.
    """

    def __init__(self, items, values, importance):
        self.items, self.values, self.importance = {i.path: i for i in items}, values, importance
        self.calls = 0

    def loss_of(self, path, rank):
        tail = 0.0 if rank == "dense" else float((self.values[path][rank:] ** 2).sum())
        return self.importance[path] * tail

    def single(self, ranks):
        self.calls += sum(map(len, ranks.values()))
        return {
            path: [Effect(self.loss_of(path, r), BASE + self.loss_of(path, r)) for r in some]
            for path, some in ranks.items()
        }

    def joint(self, ranks):
        total = sum(self.loss_of(path, rank) for path, rank in ranks.items())
        return Effect(total, BASE + total)

    def influence(self):
        blocks = 1 + max(item.block for item in self.items.values())
        return [1 - 0.5 / (1 + b) for b in range(blocks)]

    def factors(self, path):
        m, n = self.items[path].shape
        k = min(m, n)
        return torch.eye(k, n), torch.from_numpy(self.values[path]).float() * torch.eye(m, k)

    def batches(self):
        return 2

    def loss(self, transforms, batch):
        total = torch.tensor(BASE, dtype=torch.float64)
        for path, transform in transforms.items():
            m, n = self.items[path].shape
            x = torch.eye(n)[None]
            a, b = self.factors(path)
            y = x @ a.T @ b.T
            lost = (transform(x, y, slice(0, m)) - y).double().square().sum()
            total = total + self.importance[path] * lost
        return total


@functools.cache
def problem(keep=0.6, multiple=1, blocks=3, seed=0, alike=False, form=PAIR, importance=1.0, width=1):
    """A problem of power-law spectra; `alike` makes all layers of one role equal.

    `width`: bits of a number of the weights; the budget is in bits."""
    rng = np.random.default_rng(seed)
    items, values, weights = [], {}, {}
    for block in range(blocks):
        for place, (role, shape) in enumerate(SHAPES.items()):
            path = f"layers.{block}.{role}"
            items.append(Item(path, shape, block, role, width=width))
            slope, scale = (0.7, 1.0) if alike else (rng.uniform(0.4, 1.2), np.exp(0.7 * rng.normal()))
            values[path] = scale * np.arange(1, min(shape) + 1) ** -slope
            weights[path] = importance if alike or place else 2.0 * importance
    budget = width * int(keep * sum(i.parameters for i in items))
    spectra = {path: (v, 0.0) for path, v in values.items()}
    probe = KnownModel(items, values, weights)
    return Problem(tuple(items), budget, multiple, form, spectra, in_loss=True, probe=probe)
