"""Make the latent cache what a model generates with, also after it was saved and loaded."""

from __future__ import annotations

from typing import Any

from slimrank.checkpoint.save import mark_model
from slimrank.errors import ModelError
from slimrank.layers.base import compressed_layers
from slimrank.layers.latent_default import LatentDefault
from slimrank.layers.transforms import transform_of


def use_latent_cache(model: Any, on: bool = True, int8: bool = False) -> None:
    """Have `model.generate` use a latent cache where none is given: now, and when the model is saved and loaded again.

    A cache that a caller passes to `generate`, `use_cache=False` and `cache_implementation` still count. What calls
    `forward` by itself, as `perplexity` does, uses the cache that it has always used.

    Args:
        model: a compressed language model.
        on: False takes it back.
        int8: see `latent_cache`.

    Raises:
        ModelError: the model has no compressed layers, so it has no latents.
    """
    if not compressed_layers(model):
        raise ModelError("the model has no compressed layers.", "slimrank compress MODEL --keep 0.8 first")
    transform = transform_of(LatentDefault.kind)
    transform.undo(model)
    if on:
        transform.apply(model, {"int8": int8})
    mark_model(model)
