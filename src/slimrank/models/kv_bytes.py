"""Bytes of the cache of keys and values, by formula: as it is, as latents, and in fewer bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import DynamicCache

from slimrank.layers.base import KINDS, compressed_layers, look_up
from slimrank.layers.latent_attention import FUSED, KEYS, VALUES, Attention, attention_layers, gives_latents, refused
from slimrank.layers.latent_numbers import AsTheyAre, Int8, numbers_of
from slimrank.layers.latent_sides import ways_of

TOKENS = (1, 4096, 32768, 131072)
GROUP, GROUP_BYTES = 64, 4  # numbers that share a scale and a zero point in a cache of few bits, and what these take
FEW_BITS = (8, 4)


@dataclass(frozen=True)
class _Side:
    """The keys or values of a layer: numbers a token, the path of the projection, and whether angles turn them."""

    width: int
    path: str
    window: int | None
    served: bool
    turned: bool


def kv_bytes(model: Any, ranks: Mapping[str, int] | None = None) -> dict[str, dict[int, int]] | None:
    """Count the bytes of a cache for one text, by formula.

    Args:
        model: a causal language model; its weights may be on the meta device.
        ranks: path of a projection -> rank of its latent; those of the model's compressed layers by default.

    Returns:
        For each cache the bytes at 1, 4,096, 32,768 and 131,072 tokens. "dynamic": keys and values as they are.
        "latent" and "latent-int8": see `slimrank.latent_cache`. "int8" and "int4": keys and values in so many bits,
        64 numbers sharing a scale and a zero point of 2 bytes each. None for a model whose cache holds something else.
    """
    sides = list(_sides(model))
    if not sides:
        return None
    ranks = ranks_of(model) if ranks is None else ranks
    itemsize = model.dtype.itemsize
    by_token: dict[str, dict[str, float]] = {"dynamic": {side.path: side.width * itemsize for side in sides}}
    for int8 in (False, True):
        numbers = numbers_of(int8)
        by_token[numbers.name] = _of_latents(sides, ranks, numbers, model)
    for bits in FEW_BITS:
        by_token[f"int{bits}"] = {side.path: side.width * (bits / 8 + GROUP_BYTES / GROUP) for side in sides}
    windows = {side.path: side.window for side in sides}
    return {name: {n: _at(n, sizes, windows) for n in TOKENS} for name, sizes in by_token.items()}


def ranks_of(model: Any) -> dict[str, int]:
    """Return the ranks of a model's compressed layers that have latents, by path."""
    return {path: layer.rank for path, layer in compressed_layers(model).items() if gives_latents(type(layer))}


def planned_ranks(forms: Mapping[str, tuple[str, int | str]]) -> dict[str, int]:
    """Return the ranks of layers that will have latents.

    Args:
        forms: path -> form, and rank or "dense".
    """
    return {path: int(rank) for path, (form, rank) in forms.items() if rank != "dense" and _has_latents(form)}


def _has_latents(form: str) -> bool:
    kind = look_up(KINDS, form.partition(":")[0])
    return kind is not None and gives_latents(kind)


def _at(tokens: int, sizes: Mapping[str, float], windows: Mapping[str, int | None]) -> int:
    return round(sum(size * min(tokens, windows.get(path) or tokens) for path, size in sizes.items()))


def _sides(model: Any) -> Iterator[_Side]:
    config = model.config.get_text_config(decoder=True)
    kept: list[Any] = list(DynamicCache(config=config).layers)
    for attention in attention_layers(model):
        layer = kept[attention.index] if attention.index < len(kept) else None
        known = any(hasattr(attention.module, name) for name in (KEYS, *FUSED))
        if layer is None or not hasattr(layer, "get_seq_length") or not known:
            continue
        window = layer.sliding_window - 1 if getattr(layer, "is_sliding", False) else None
        served, turned = refused(attention, config, layer) is None, len(ways_of(attention.module)) > 1
        yield _Side(_width(attention, KEYS, config), attention.side(KEYS), window, served, turned)
        yield _Side(_width(attention, VALUES, config), attention.side(VALUES), window, served, False)


def _width(attention: Attention, name: str, config: Any) -> int:
    """Return how many keys or values a layer makes of a token; one layer for all makes those of the queries, too."""
    projection = getattr(attention.module, name, None)
    if projection is not None:
        return _outputs(projection)
    fused = next((getattr(attention.module, each) for each in FUSED if hasattr(attention.module, each)), None)
    if fused is not None:
        return (_outputs(fused) - config.num_attention_heads * _head_dim(config)) // 2
    return _width(attention, KEYS, config)  # Gemma 4 may take its keys for values


def _outputs(layer: Any) -> int:
    """Return the outputs of a linear layer: of torch, of transformers, or one that was split."""
    sizes = getattr(layer, "sizes", None) or (getattr(layer, "out_features", None) or layer.nf,)
    return int(sum(sizes))


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _of_latents(
    sides: list[_Side], ranks: Mapping[str, int], numbers: AsTheyAre | Int8, model: Any
) -> dict[str, float]:
    """Return the bytes of a token for each side, and for what turns the keys."""
    itemsize = model.dtype.itemsize
    whole = {side.path: float(side.width * itemsize) for side in sides}
    found = {s.path: float(numbers.bytes(ranks[s.path], itemsize)) for s in sides if s.served and s.path in ranks}
    found = {path: size for path, size in found.items() if size < whole[path]}
    turned = {side.path for side in sides if side.turned and side.path in found}
    angles = 2 * _angles(model.config.get_text_config(decoder=True)) * itemsize
    if turned and sum(whole[path] - found[path] for path in turned) <= angles:
        return whole | {path: size for path, size in found.items() if path not in turned}
    return whole | found | ({"angles": angles} if turned else {})


def _angles(config: Any) -> int:
    """Return how many numbers of a head are turned."""
    rope = getattr(config, "rope_parameters", None) or {}
    return int(_head_dim(config) * (rope.get("partial_rotary_factor") or 1))
