"""Make a loaded model faster, exactly: layers of the same inputs together, and weights in the faster order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimrank.checkpoint.save import mark_model
from slimrank.errors import ModelError
from slimrank.layers.base import CompressedLinear, compressed_layers
from slimrank.layers.packed import join, reader
from slimrank.layers.packed_model import unpack_layers
from slimrank.models.contexts import evaluating
from slimrank.models.memory_layout import choose_layouts

PROBE_TOKENS = 4
Layer = TypeVar("Layer", bound=nn.Module)


def pack(model: nn.Module) -> int:
    """Make the compressed layers of a model faster, in place; the outputs are the same up to rounding.

    Layers of the same inputs (q, k and v; gate and up) get one product for their first factors. On a CPU, all other
    parts lie in memory by rows or by columns, whichever a measurement of a few seconds finds faster for one token.
    Parameters keep their names and shapes. The configuration says that the model is packed: saved by `save_pretrained`
    it is loaded packed, with slimrank and without. Call it last: after `model.to(...)`, which gives parameters other
    memory, layers compute by themselves until it is called again. It runs the model once, on four tokens.

    Returns:
        How many groups of layers there are.

    Raises:
        ModelError: the model has no compressed layers.
    """
    layers = compressed_layers(model)
    if not layers:
        raise ModelError("the model has no compressed layers.", "slimrank compress MODEL --keep 0.8 first")
    unpack_layers(layers.values())
    groups = [group for group in groups_of(model, _alone(list(layers.values()))) if len(group) > 1]
    for group in groups:
        join(group)
    choose_layouts(layers.values())
    _tell(model)
    return len(groups)


def unpack(model: nn.Module) -> None:
    """Undo `pack`, in place: every layer computes by itself, from weights by rows, and is saved so."""
    unpack_layers(compressed_layers(model).values())
    _tell(model)


def groups_of(model: Any, layers: Sequence[Layer]) -> list[list[Layer]]:
    """Group layers that read the same tensor, of one dtype and on one device; the model runs on four tokens.

    Layers that are called several times are left out.
    """
    inputs: list[Tensor] = []  # held, so that no tensor gets the place of another
    found: dict[Any, list[Layer]] = {}

    def look(layer: Any, args: tuple[Any, ...]) -> None:
        inputs.append(args[0])
        weight = next(layer.parameters())
        found.setdefault((id(args[0]), weight.dtype, weight.device), []).append(layer)

    handles = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        with evaluating(model):
            model(input_ids=torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    calls = Counter(id(layer) for group in found.values() for layer in group)
    return [[layer for layer in group if calls[id(layer)] == 1] for group in found.values()]


def _tell(model: nn.Module) -> None:
    """Let the configuration of a compressed model say how it is changed now; one inside of adapters keeps its own."""
    if isinstance(model, PreTrainedModel) and hasattr(model.config, "slimrank"):
        mark_model(model)


def _alone(layers: list[CompressedLinear]) -> list[CompressedLinear]:
    """Return the layers whose readers no other layer holds."""
    readers = [(layer, reader(layer)) for layer in layers]
    held = Counter(id(each.weight) for _, each in readers if each is not None)
    return [layer for layer, each in readers if each is not None and held[id(each.weight)] == 1]
