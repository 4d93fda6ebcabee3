"""Compressed layers as pairs of balanced factors, for the time of training.

One learning rate suits all numbers of a pair with A A^T = B^T B. In a pivot layer, a step of the interpolation moves
outputs far more than one of the skeleton, so gradient steps of a usual size destroy it.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from slimrank.layers.base import CompressedLinear, compressed_layers
from slimrank.layers.forms import pivot_layer
from slimrank.layers.low_rank import LowRankLinear
from slimrank.layers.pivot import PivotLinear


class BalancedPairs:
    """Balances pairs in place, and puts pairs of the same product where pivot layers are, until `end`.

    Layers whose weights another layer holds, too, and those of other kinds stay as they are.

    Args:
        model: changed in place.
        within: only layers whose path begins so.
    """

    def __init__(self, model: nn.Module, within: str = "") -> None:
        self.model = model
        self._pivots: dict[str, PivotLinear] = {}
        self._numbers: dict[Tensor, Tensor] = {}
        for path, layer in _alone(model).items():
            if not path.startswith(within):
                continue
            if type(layer) is PivotLinear:
                self._pivots[path] = layer
                model.set_submodule(path, _as_pair(layer))
            elif type(layer) is LowRankLinear:
                self._balance(layer)

    def end(self, kept: bool) -> None:
        """Store pivots as such again, with what their pairs have learnt; or restore all if it is not kept.

        Biases that were trained are restored by their owner.
        """
        for path, layer in self._pivots.items():
            pair = self.model.get_submodule(path)
            if kept:
                _take(layer, pair)
            self.model.set_submodule(path, layer)
        if not kept:
            for parameter, numbers in self._numbers.items():
                parameter.data = numbers

    @torch.no_grad()
    def _balance(self, layer: LowRankLinear) -> None:
        a, b = layer.A.weight, layer.B.weight
        for parameter, new in zip((a, b), balanced(*layer.factors()), strict=True):
            self._numbers[parameter], parameter.data = parameter.data, new.to(parameter)


def put_pairs(model: nn.Module) -> int:
    """Put pairs of the same product where pivot layers are, in place; return how many. Tied layers stay."""
    pivots = {path: layer for path, layer in _alone(model).items() if type(layer) is PivotLinear}
    for path, layer in pivots.items():
        model.set_submodule(path, _as_pair(layer))
    return len(pivots)


def balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the same product B A with A A^T = B^T B, diagonal."""
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.t())
    u, s, v = torch.linalg.svd(rb @ ra.t())
    return (s.sqrt()[:, None] * v) @ qa.t(), (qb @ u) * s.sqrt()


def _alone(model: nn.Module) -> dict[str, CompressedLinear]:
    """Return the compressed layers whose weights no other layer holds."""
    layers = compressed_layers(model)
    held = Counter(p.data_ptr() for layer in layers.values() for p in layer.parameters())
    return {path: layer for path, layer in layers.items() if all(held[p.data_ptr()] == 1 for p in layer.parameters())}


@torch.no_grad()
def _as_pair(layer: PivotLinear) -> LowRankLinear:
    """Return a balanced pair that computes what a pivot layer does; both have one bias."""
    like = layer.skeleton.weight
    a, b = (part.to(like) for part in balanced(*layer.factors()))
    pair = LowRankLinear.from_factors(a, b)
    pair.B.bias = layer.bias  # type: ignore[assignment]
    return pair.train(layer.training)


@torch.no_grad()
def _take(layer: PivotLinear, pair: nn.Module) -> None:
    """Let a pivot layer compute what a pair does."""
    assert isinstance(pair, LowRankLinear)
    like = layer.skeleton.weight
    found = pivot_layer(*pair.factors(), side=layer.side, dtype=like.dtype)
    for part, new in ((layer.skeleton, found.skeleton), (layer.interpolation, found.interpolation)):
        part.weight.data = new.weight.data.to(like.device)
    layer.order = found.order.to(layer.order.device)
