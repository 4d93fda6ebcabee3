"""Make a loaded model faster, exactly: layers of the same inputs together, and weights in the faster order."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.errors import ModelError
from slimrank.layers.base import CompressedLinear, compressed_layers
from slimrank.layers.packed import is_joined, join, part, reader
from slimrank.models.contexts import evaluating
from slimrank.models.memory_layout import by_rows, choose_layouts

PROBE_TOKENS = 4


def pack(model: nn.Module) -> int:
    """Make the compressed layers of a model faster, in place; the outputs are the same up to rounding.

    Layers of the same inputs (q, k and v; gate and up) get one product for their first factors. On a CPU, all other
    parts lie in memory by rows or by columns, whichever a measurement of a few seconds finds faster for one token.
    Parameters keep their names and shapes, so the model is saved as before. Call it last: after `model.to(...)`, which
    gives parameters other memory, layers compute by themselves until it is called again. It runs the model once, on
    four tokens.

    Returns:
        How many groups of layers there are.

    Raises:
        ModelError: the model has no compressed layers.
    """
    layers = compressed_layers(model)
    if not layers:
        raise ModelError("the model has no compressed layers.", "slimrank compress MODEL --keep 0.8 first")
    unpack(model)
    groups = [group for group in _groups(model, list(layers.values())) if len(group) > 1]
    for group in groups:
        join(group)
    choose_layouts(layers.values())
    return len(groups)


def unpack(model: nn.Module) -> None:
    """Compute every layer by itself again, from weights by rows."""
    layers = compressed_layers(model).values()
    for layer in layers:
        if is_joined(layer):
            part(layer)
    by_rows(layers)


def _groups(model: Any, layers: list[CompressedLinear]) -> list[list[CompressedLinear]]:
    """Return the layers that read the same tensor, of those that can be computed together."""
    inputs: list[Tensor] = []  # held, so that no tensor gets the place of another
    found: dict[int, list[CompressedLinear]] = {}

    def look(layer: Any, args: tuple[Any, ...]) -> None:
        inputs.append(args[0])
        found.setdefault(id(args[0]), []).append(layer)

    handles = [layer.register_forward_pre_hook(look) for layer in _alone(layers)]
    try:
        with evaluating(model):
            model(input_ids=torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    calls = Counter(id(layer) for group in found.values() for layer in group)
    return [[layer for layer in group if calls[id(layer)] == 1] for group in found.values()]


def _alone(layers: list[CompressedLinear]) -> list[CompressedLinear]:
    """Return the layers whose readers no other layer holds."""
    readers = [(layer, reader(layer)) for layer in layers]
    held = Counter(id(each.weight) for _, each in readers if each is not None)
    return [layer for layer, each in readers if each is not None and held[id(each.weight)] == 1]
