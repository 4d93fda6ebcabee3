"""The cache of a model: what it takes, and the next inputs with it under the name that `forward` uses."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from slimrank.layers.latent_cache import NAMES, LatentCache, cache_name


def cache_bytes(output: Any) -> int:
    """Count the bytes of all tensors in the cache of an output; 0 if it has none."""
    values = dict(output.items())
    tensors: dict[int, Tensor] = {}
    _collect([values[name] for name in NAMES if values.get(name) is not None], tensors)
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


def _collect(thing: Any, tensors: dict[int, Tensor]) -> None:
    """Find the tensors in lists, mappings and objects of a cache, one for each piece of memory."""
    if isinstance(thing, Tensor):
        tensors[thing.untyped_storage().data_ptr()] = thing
    elif isinstance(thing, LatentCache):
        _collect(list(thing.tensors()), tensors)
    elif isinstance(thing, dict):
        _collect(list(thing.values()), tensors)
    elif isinstance(thing, (list, tuple)):
        for part in thing:
            _collect(part, tensors)
    elif type(thing).__module__.startswith("transformers.") and _is_part(type(thing).__name__.lower()):
        _collect(vars(thing), tensors)


def _is_part(name: str) -> bool:
    """Tell by the name of a class whether it is a cache, or what one holds for a layer."""
    return "cache" in name or "layer" in name


def next_inputs(model: Any, output: Any, ids: Tensor) -> dict[str, Any]:
    """Return the arguments that continue `output` by the last of the tokens `ids`.

    A model without a cache reads all tokens again.
    """
    values = dict(output.items())
    taken = inspect.signature(model.forward).parameters
    name = cache_name(model)
    cache = next((values[name] for name in NAMES if values.get(name) is not None), None)
    if name is None or cache is None:
        return {"input_ids": ids}
    inputs = {"input_ids": ids[:, -1:], name: cache}
    if "cache_position" in taken:  # which transformers 5.0 does not count by itself for a state-space model
        inputs["cache_position"] = torch.arange(ids.shape[1] - 1, ids.shape[1], device=ids.device)
    return inputs
