"""A cache of latents instead of keys and values. Copied into saved models; needs torch and transformers only."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from slimrank.layers.latent_attention import (
    KEYS,
    VALUES,
    Attention,
    attention_layers,
    by_reason,
    norm_of,
    refused,
    refused_side,
    saving,
)
from slimrank.layers.latent_layer import LatentLayer
from slimrank.layers.latent_numbers import AsTheyAre, Int8, numbers_of
from slimrank.layers.latent_sides import Latent, Plain, ways_of
from slimrank.layers.rotations import Rotations

# What models call their cache: of transformers 5.24 on; before it, of attention and of state-space models.
NAMES = ("cache", "past_key_values", "cache_params")


def cache_name(model: nn.Module) -> str | None:
    """Return the argument that a model takes its cache as; None if it has none."""
    taken = inspect.signature(model.forward).parameters
    return next((name for name in NAMES if name in taken), None)


class LatentCache(Cache):
    """The cache of a model whose k_proj and v_proj are compressed: it keeps latents where they are smaller.

    `latent_cache` makes it. Keys and values are built from latents at every step, and turned by the rotary embedding
    as they were when they came in.

    Attributes:
        latent: paths of the projections whose latents are kept -> rank.
        ordinary: paths of projections, or of attention layers, that are kept as without it -> reason.
    """

    def __init__(
        self, layers: list[Any], rotations: Rotations, latent: dict[str, int], ordinary: dict[str, str]
    ) -> None:
        super().__init__(layers=layers)
        self.rotations, self.ordinary, self._ranks = rotations, ordinary, latent

    @property
    def latent(self) -> dict[str, int]:
        """Paths of the projections whose latents are kept, with their ranks."""
        return {path: rank for path, rank in self._ranks.items() if path not in self.ordinary}

    @property
    def nbytes(self) -> int:
        """Bytes that it holds now."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        """Yield all that it holds."""
        for layer in self.layers:
            yield from (t for t in vars(layer).values() if isinstance(t, Tensor) and t.dim() == 4)
        for each in self.rotations.all:
            yield from (each.cos, each.sin)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.rotations.all.clear()

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Cut the last tokens off, as `DynamicCache.crop` does."""
        super().crop(*args, **kwargs)
        length = next((layer.get_seq_length() for layer in self.layers if isinstance(layer, LatentLayer)), 0)
        self.rotations.cut(length)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Choose texts of the batch, as beams do."""
        super().reorder_cache(beam_idx)
        self.rotations.of_texts(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every text of the batch."""
        super().batch_repeat_interleave(repeats)
        self.rotations.of_texts(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these texts of the batch."""
        super().batch_select_indices(indices)
        self.rotations.of_texts(lambda t: t[indices.to(t.device)])


def latent_cache(model: Any, int8: bool = False) -> LatentCache:
    """Return an empty cache that keeps latents, for `generate` or `forward`.

    transformers takes it as `cache`, and before version 5.24 as `past_key_values`.

    A compressed k_proj or v_proj makes its outputs from a few numbers, its latent. These are kept instead of keys and
    values, which are built from them at every step: the same numbers, in less memory and with more work. Whatever
    cannot be kept so (dense layers, ranks that save nothing, sliding windows, models with one layer for q, k and v)
    stays as it is; `LatentCache.ordinary` names it with the reason, and a warning sums that up. At the first step,
    keys and values that are built are compared with those of the model; a layer where they differ is turned off.

    Args:
        model: a causal language model; its attention layers get a hook, which does nothing with other caches.
        int8: keep latents as integers of 8 bits, with a scale for each token: half as large, and no longer exact.
    """
    config, numbers = model.config.get_text_config(decoder=True), numbers_of(int8)
    layers, rotations, ordinary = list(DynamicCache(config=config).layers), Rotations(), dict[str, str]()
    found = attention_layers(model)
    sides = dict(_sides(found, config, layers, numbers, ordinary))
    _drop_keys_that_save_nothing(sides, found, ordinary)
    for attention in found:
        keys, values = (sides.get(attention.side(name), Plain()) for name in (KEYS, VALUES))
        if isinstance(keys, Latent) or isinstance(values, Latent):
            layers[attention.index] = LatentLayer(keys, values, rotations, ordinary)
            _listen(attention.module)
    if ordinary:
        warnings.warn("the latent cache keeps as they are: " + "; ".join(by_reason(ordinary)), stacklevel=2)
    return LatentCache(layers, rotations, {path: side.layer.rank for path, side in sides.items()}, ordinary)


def _sides(
    found: list[Attention], config: Any, layers: list[Any], numbers: AsTheyAre | Int8, ordinary: dict[str, str]
) -> Iterator[tuple[str, Latent]]:
    """Yield the projections whose latents can be kept; add the others to `ordinary`."""
    for attention in found:
        kept = layers[attention.index] if attention.index < len(layers) else None
        reason = refused(attention, config, kept)
        if reason is not None:
            ordinary[attention.path] = reason
            continue
        for name in (KEYS, VALUES):
            path, layer = attention.side(name), getattr(attention.module, name)
            reason = refused_side(layer, numbers)
            if reason is not None:
                ordinary[path] = reason
            elif name == KEYS:
                yield path, Latent(path, layer, numbers, norm_of(attention.module), ways_of(attention.module))
            else:
                yield path, Latent(path, layer, numbers)


def _drop_keys_that_save_nothing(sides: dict[str, Latent], found: list[Attention], ordinary: dict[str, str]) -> None:
    """Keep all keys as they are if their latents save less than what turns them takes, once for all layers."""
    keys = {a.side(KEYS): a.module for a in found if a.side(KEYS) in sides and len(sides[a.side(KEYS)].ways) > 1}
    if not keys:
        return
    saved = sum(saving(sides[path].layer, sides[path].numbers) for path in keys)
    layer = sides[next(iter(keys))].layer
    turns = 2 * max(getattr(module, "head_dim", 0) for module in keys.values())
    if saved <= turns * next(layer.parameters()).element_size():
        for path in keys:
            ordinary[path] = "the latents of all keys save less than the rotary embedding takes to turn them"
            del sides[path]


def _listen(attention: nn.Module) -> None:
    """Have an attention layer tell the cache what it is called with."""
    if hand_over not in attention._forward_pre_hooks.values():
        attention.register_forward_pre_hook(hand_over, with_kwargs=True)


def hand_over(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell a latent cache, if an attention layer is called with one, the inputs of the layer."""
    cache = next((kwargs[name] for name in NAMES if isinstance(kwargs.get(name), LatentCache)), None)
    layer = None if cache is None else cache.layers[attention.layer_idx]
    if isinstance(layer, LatentLayer):
        layer.take(args[0] if args else kwargs["hidden_states"], kwargs.get("position_embeddings"))
