"""transformers with compressed layers of the same inputs computed together."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from slimrank.evaluate.engine import ENGINES, Running
from slimrank.evaluate.engines.eager import Eager, EagerModel
from slimrank.evaluate.options import Loading
from slimrank.layers.base import compressed_layers
from slimrank.models.packing import pack


@ENGINES.add
class Packed(Eager):
    """Plain transformers after `slimrank.pack(model)`; a model without compressed layers stays as it is."""

    id: ClassVar[str] = "packed"
    title: ClassVar[str] = "transformers, compressed layers of the same inputs together (slimrank.pack)"

    def load(self, model: str | Path, loading: Loading) -> Running:
        """See `Engine.load`."""
        running = super().load(model, loading)
        assert isinstance(running, EagerModel)
        if compressed_layers(running.model):
            pack(running.model)
        return running
