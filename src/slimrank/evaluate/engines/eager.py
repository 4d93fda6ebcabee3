"""transformers, as a user of `generate` meets it: torch runs one operation after the other."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from slimrank.evaluate.engine import ENGINES, Engine, Round, Running
from slimrank.evaluate.options import Loading
from slimrank.evaluate.speed import one_round
from slimrank.models.cache import cache_bytes
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
        self.context = context_of(loaded.model)

    def round(self, ids: Tensor, new_tokens: int) -> Round:
        """See `Running.round`."""
        prefill, decode, last = one_round(self.model, ids, new_tokens)
        return Round(prefill, decode, cache_bytes(last))


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
