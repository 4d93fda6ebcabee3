"""Run a GGUF file by way of transformers, which reads it as dense weights: a check of what was written."""

from __future__ import annotations

import inspect
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

from slimrank.exporting.engine import need
from slimrank.exporting.gguf.file import FACTORS, MODEL_FILE, PURPOSE, GgufModel
from slimrank.exporting.runner import Runner, model_in
from slimrank.models.cache import NAMES
from slimrank.models.gguf import gguf_place, load_dense


class ReadBack(Runner):
    """What transformers reads from a GGUF file, in float32.

    Args:
        source: a folder with the file; or a model, which is written into a scratch folder first.
    """

    names = {"input_ids", "attention_mask", "position_ids"}  # noqa: RUF012 (as in the other runners)

    def __init__(self, source: Path | GgufModel) -> None:
        if isinstance(source, GgufModel):
            super().__init__(None)
            with tempfile.TemporaryDirectory(prefix="slimrank-") as scratch:
                source.write(Path(scratch) / MODEL_FILE)
                self.model = self._read(Path(scratch) / MODEL_FILE)
        else:
            file = model_in(source, MODEL_FILE)
            super().__init__(file)
            self.model = self._read(file)
        taken = inspect.signature(self.model.forward).parameters
        self._name = next(name for name in NAMES if name in taken)
        self._cache: DynamicCache | None = None

    def _read(self, file: Path) -> Any:
        model, _ = load_dense(gguf_place(file), "float32")
        stored = {tensor.name: tensor for tensor in need("gguf", PURPOSE).GGUFReader(file).tensors}
        if FACTORS in stored:  # which transformers does not read
            rotary = model.model.rotary_emb
            rotary.inv_freq = rotary.inv_freq / torch.from_numpy(np.array(stored[FACTORS].data))
        return model.eval().requires_grad_(False)

    def _forget(self) -> None:
        self._cache = None

    def _compute(self, given: dict[str, np.ndarray], beams: np.ndarray) -> np.ndarray:
        if self._cache is None:
            self._cache = DynamicCache(config=self.model.config)
        else:
            self._cache.batch_select_indices(torch.from_numpy(beams).long())
        with torch.no_grad():
            inputs: dict[str, Any] = {name: torch.from_numpy(value) for name, value in given.items()}
            logits: np.ndarray = self.model(**inputs, **{self._name: self._cache}, use_cache=True).logits.numpy()
        return logits
