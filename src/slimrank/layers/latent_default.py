"""A latent cache as what `generate` uses by itself. Copied into saved models; imports nothing but torch."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from slimrank.layers.latent_cache import NAMES, cache_name, latent_cache
from slimrank.layers.transforms import Transform


class LatentDefault(Transform):
    """A model whose `generate` makes a latent cache where no cache is given; "int8" says how latents are stored."""

    kind: ClassVar[str] = "latent_cache"
    order: ClassVar[int] = 90

    def apply(self, model: nn.Module, entry: Mapping[str, Any]) -> None:
        """See `Transform.apply`."""
        own: Any = functools.partial(generate_with_latents, model, bool(entry["int8"]))
        model.generate = own

    def undo(self, model: nn.Module) -> None:
        """See `Transform.undo`."""
        if self.entry(model) is not None:
            del model.generate

    def entry(self, model: nn.Module) -> dict[str, Any] | None:
        """See `Transform.entry`."""
        own = vars(model).get("generate")
        if not isinstance(own, functools.partial) or own.func is not generate_with_latents:
            return None
        return {"int8": own.args[1]}


def generate_with_latents(model: Any, int8: bool, *args: Any, **kwargs: Any) -> Any:
    """Generate as the model's class does, with a latent cache unless the caller asks for another one, or for none."""
    config = kwargs.get("generation_config") or model.generation_config
    wants = {name: kwargs.get(name, getattr(config, name, None)) for name in ("use_cache", "cache_implementation")}
    free = all(kwargs.get(name) is None for name in NAMES) and wants["cache_implementation"] in (None, "dynamic")
    if free and wants["use_cache"] is not False:
        kwargs[str(cache_name(model))] = latent_cache(model, int8)
    return type(model).generate(model, *args, **kwargs)
