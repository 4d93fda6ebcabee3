"""Attention layers, and whether a cache can keep their latents. Copied into saved models; imports nothing but torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from slimrank.layers.base import CompressedLinear
from slimrank.layers.latent_numbers import AsTheyAre, Int8

KEYS, VALUES = "k_proj", "v_proj"
NORMS = ("k_norm", "k_layernorm", "key_layernorm", "qk_norm")
FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv")


@dataclass(frozen=True)
class Attention:
    """An attention layer.

    Attributes:
        path: in the model.
        module: the layer itself.
        index: its number in the cache.
    """

    path: str
    module: Any
    index: int

    def side(self, name: str) -> str:
        """Return the path of its projection to keys or values."""
        return f"{self.path}.{name}"


def attention_layers(model: Any) -> list[Attention]:
    """Return the decoder's layers that have a number in the cache; of one number, that with keys and values."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[int, Attention] = {}
    for module in decoder.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and id(module) in paths and not _has_projections(found.get(index)):
            found[index] = Attention(paths[id(module)], module, index)
    return [found[index] for index in sorted(found)]


def _has_projections(layer: Attention | None) -> bool:
    return layer is not None and hasattr(layer.module, KEYS)


def refused(layer: Attention, config: Any, kept: Any) -> str | None:
    """Say why neither keys nor values of a layer can come from latents; None if they may.

    Args:
        layer: which.
        config: of the decoder.
        kept: what transformers caches the layer in; None if nothing.
    """
    module = layer.module
    if any(hasattr(module, name) for name in ("kv_b_proj", "kv_a_proj_with_mqa")):
        return "the model has latents of its own"
    if getattr(config, "num_kv_shared_layers", None):
        return "layers of the model share keys and values"
    if kept is None:
        return "it has no cache"
    if getattr(kept, "is_sliding", False):
        return "it has a sliding window"
    if type(kept).__name__ != "DynamicLayer":
        return f"its cache is of another kind ({type(kept).__name__})"
    if any(hasattr(module, name) for name in FUSED):
        return "q, k and v are one layer"
    if not _has_projections(layer) or getattr(module, VALUES, None) is None:
        return f"it has no {KEYS} and {VALUES}"
    if getattr(config, "clip_qkv", None) is not None:
        return "the model clips keys and values"
    return None


def refused_side(projection: nn.Module, numbers: AsTheyAre | Int8) -> str | None:
    """Say why a projection's outputs are kept as they are; None if its latents can be."""
    if not isinstance(projection, CompressedLinear):
        return "it is not compressed"
    if not gives_latents(type(projection)):
        return f"layers of the kind '{projection.kind}' have no latent"
    if saving(projection, numbers) <= 0:
        return f"its rank of {projection.rank} saves nothing for {projection.out_features} outputs"
    return None


def gives_latents(kind: type[CompressedLinear]) -> bool:
    """Tell whether outputs of layers of a kind can be built from a latent."""
    return kind.from_latent is not CompressedLinear.from_latent


def saving(projection: CompressedLinear, numbers: AsTheyAre | Int8) -> int:
    """Count the bytes that a latent saves for one token."""
    itemsize = next(projection.parameters()).element_size()
    return projection.out_features * itemsize - numbers.bytes(projection.rank, itemsize)


def norm_of(attention: nn.Module) -> nn.Module | None:
    """Return the norm of keys, if there is one."""
    found = (getattr(attention, name, None) for name in NORMS)
    return next((norm for norm in found if isinstance(norm, nn.Module)), None)


def by_reason(ordinary: dict[str, str]) -> Iterator[str]:
    """Yield a line for each reason, with the paths that it keeps from being latents."""
    for reason in dict.fromkeys(ordinary.values()):
        paths = [path for path, other in ordinary.items() if other == reason]
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        yield f"'{paths[0]}'{more}: {reason}"
