"""One step of a decoder as a function of tensors: new tokens and the old cache in, logits and the new cache out."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from slimrank.errors import ModelError
from slimrank.layers.experts import Experts
from slimrank.layers.quantized import QuantizedLinear, quantized_layers
from slimrank.models.cache import NAMES
from slimrank.models.contexts import evaluating, swapped

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
LONG = ("dynamic", "longrope")  # rotary positions that change when the text gets longer than some length
OTHER_ENGINE = "run it with transformers"
TRIED = 3  # tokens that the cache is looked at with


@dataclass(frozen=True)
class CacheShape:
    """What a model keeps of past tokens.

    Attributes:
        holders: for each entry of the cache, whether it holds keys and values of its own.
        sizes: heads and width, of the keys and of the values of those that do, in turn.
    """

    holders: tuple[bool, ...]
    sizes: tuple[tuple[int, int], ...]

    def names(self, prefix: str) -> list[str]:
        """Return the names of all keys and values: PREFIX.0.key, PREFIX.0.value, ..."""
        return [f"{prefix}.{i}.{part}" for i in range(len(self.sizes) // 2) for part in ("key", "value")]

    def example(self, batch: int, length: int, dtype: torch.dtype) -> list[Tensor]:
        """Return random keys and values of so many tokens."""
        return [torch.randn(batch, heads, length, width, dtype=dtype) for heads, width in self.sizes]


class CachedStep(nn.Module):
    """Computes logits and the new cache of a model, where the cache is a list of tensors.

    All keys are kept, also those that a sliding window has passed: the mask hides them.
    """

    def __init__(self, model: Any, shape: CacheShape) -> None:
        super().__init__()
        self.decoder, self.shape = model, shape  # OpenVINO looks at an attribute `model` for quantisers
        taken = inspect.signature(model.forward).parameters
        self.name = next(name for name in NAMES if name in taken)
        self.inputs = [name for name in ("input_ids", "attention_mask", "position_ids") if name in taken]

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Compute one step.

        Args:
            given: the inputs in the order of `inputs`, then all keys and values in turn.
        """
        count = len(self.inputs)
        cache = self._filled(given[count:])
        arguments: dict[str, Any] = {**dict(zip(self.inputs, given, strict=False)), self.name: cache}
        output = self.decoder(**arguments, use_cache=True)
        layers: list[Any] = [layer for layer, holds in zip(cache.layers, self.shape.holders, strict=True) if holds]
        return (output.logits, *(t for layer in layers for t in (layer.keys, layer.values)))

    def _filled(self, past: tuple[Tensor, ...]) -> DynamicCache:
        cache = DynamicCache()
        tensors = iter(past)
        for holds in self.shape.holders:
            layer: Any = DynamicLayer()
            if holds:
                layer.keys, layer.values = next(tensors), next(tensors)
                layer.dtype, layer.device, layer.is_initialized = layer.keys.dtype, layer.keys.device, True
            cache.layers.append(layer)
        return cache

    def example(self) -> tuple[Tensor, ...]:
        """Return inputs to trace with: two texts of 5 old tokens and 3 new ones, so that no size is 1 by chance."""
        made = {
            "input_ids": torch.ones(2, 3, dtype=torch.long),
            "attention_mask": torch.ones(2, 8, dtype=torch.long),
            "position_ids": torch.arange(5, 8).repeat(2, 1),
        }
        dtype = next(self.decoder.parameters()).dtype
        return (*(made[name] for name in self.inputs), *self.shape.example(2, 5, dtype))

    @contextmanager
    def traceable(self) -> Iterator[None]:
        """Prepare for a trace: without gradients, warnings and packed integers."""
        plain = {path: _plain(layer) for path, layer in quantized_layers(self.decoder).items()}
        with warnings.catch_warnings(), torch.no_grad(), swapped(self.decoder, plain):
            warnings.simplefilter("ignore")  # of tracing: what it may not follow is refused before, and measured after
            yield


def _plain(layer: QuantizedLinear) -> nn.Linear:
    """Return an ordinary layer of the same weight: a trace compares states, and that of integers is packed."""
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight, linear.bias = layer.weight, layer.bias
    return linear


def cached_step(model: Any) -> CachedStep:
    """Return the step of a model, in evaluation mode.

    Raises:
        ModelError: tracing cannot follow what it does, or its cache holds something other than keys and values.
    """
    what = type(model).__name__
    _refuse_unfollowed(model, what)
    with evaluating(model):
        output = model(input_ids=torch.zeros(1, TRIED, dtype=torch.long), use_cache=True)
    cache = next((output[name] for name in NAMES if output.get(name) is not None), None)
    if not isinstance(cache, DynamicCache):
        found = "no cache" if cache is None else f"a cache of the class {type(cache).__name__}"
        raise ModelError(f"{what} cannot be exported: it has {found}; a DynamicCache is needed.", OTHER_ENGINE)
    return CachedStep(model, _shape_of(cache, what)).eval()


def _refuse_unfollowed(model: Any, what: str) -> None:
    """Refuse models whose operations depend on the values of their inputs: a trace holds those of its example."""
    config = model.config.get_text_config()
    experts = any(isinstance(module, Experts) for module in model.modules())
    if experts or any((getattr(config, name, None) or 0) > 1 for name in EXPERTS):
        raise ModelError(
            f"{what} cannot be exported: it has experts. Each token chooses its own, which a trace does not follow.",
            OTHER_ENGINE,
        )
    about = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parts = [about, *(part for part in about.values() if isinstance(part, dict))]
    kind = next((part["rope_type"] for part in parts if part.get("rope_type") in LONG), None)
    if kind is not None:
        raise ModelError(
            f"{what} cannot be exported: its rotary positions ('{kind}') depend on the length of the text, which a "
            "trace does not follow.",
            OTHER_ENGINE,
        )


def _shape_of(cache: DynamicCache, what: str) -> CacheShape:
    holders, sizes = [], []
    for number, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if type(layer).__name__ not in ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"):
            raise ModelError(
                f"{what} cannot be exported: entry {number} of its cache is a {type(layer).__name__}, which holds "
                "something other than keys and values.",
                OTHER_ENGINE,
            )
        holders.append(isinstance(keys, Tensor) and isinstance(values, Tensor))
        sizes += [(int(t.shape[1]), int(t.shape[3])) for t in (keys, values) if isinstance(t, Tensor)]
    return CacheShape(tuple(holders), tuple(sizes))
