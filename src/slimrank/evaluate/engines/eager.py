"""transformers, as a user of `generate` meets it: torch runs one operation after the other."""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from slimrank.evaluate.engine import ENGINES, Engine, Round, Running
from slimrank.evaluate.options import Loading
from slimrank.evaluate.speed import one_round
from slimrank.layers.latent_attention import by_reason
from slimrank.layers.latent_cache import LatentCache, latent_cache
from slimrank.layers.latent_numbers import numbers_of
from slimrank.models.cache import cache_bytes
from slimrank.models.kv_bytes import kv_bytes
from slimrank.models.load import load_model
from slimrank.models.placement import resolve_device
from slimrank.models.storage import saved_bytes
from slimrank.models.structure import context_of, parameters_of


class EagerModel(Running):
    """A model in torch, on its device."""

    def __init__(self, name: str, loaded: Any, device: torch.device) -> None:
        self.model = loaded.model.to(device)
        self.name, self.notes = name, loaded.notes
        self.dtype = str(loaded.model.dtype).removeprefix("torch.")
        self.parameters, self.weight_bytes = parameters_of(loaded.model), saved_bytes(loaded.model)
        self.vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
        self.context, self.kv_bytes = context_of(loaded.model), kv_bytes(loaded.model)
        self.cache: Callable[[Any], Any] | None = None

    def use_cache(self, kind: str) -> None:
        """See `Running.use_cache`; what a latent cache keeps as it is goes to the notes."""
        if kind == "dynamic":
            return
        self.cache = partial(_quietly, int8=kind == numbers_of(True).name)
        self.notes = [*self.notes, *(f"kept as it is: {line}" for line in by_reason(self.cache(self.model).ordinary))]

    def round(self, ids: Tensor, new_tokens: int) -> Round:
        """See `Running.round`."""
        prefill, decode, last = one_round(self.model, ids, new_tokens, self.cache)
        return Round(prefill, decode, cache_bytes(last))


def _quietly(model: Any, int8: bool) -> LatentCache:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the notes say it
        return latent_cache(model, int8)


@ENGINES.add
class Eager(Engine):
    """Plain transformers."""

    id: ClassVar[str] = "transformers"
    title: ClassVar[str] = "transformers, one operation after the other"

    def load(self, model: str | Path, loading: Loading) -> Running:
        """See `Engine.load`."""
        return EagerModel(
            str(model), load_model(model, loading.dtype, loading.progress), resolve_device(loading.device)
        )

    def versions(self) -> dict[str, str]:
        """See `Engine.versions`."""
        return {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
