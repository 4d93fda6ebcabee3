"""Folders that `slimrank export` wrote, in the engine that they were written for."""

from __future__ import annotations

import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from slimrank.errors import ModelError, RecipeError
from slimrank.evaluate.engine import Engine, Round, Running
from slimrank.evaluate.options import Loading
from slimrank.exporting.engine import need
from slimrank.exporting.record import RECORD
from slimrank.exporting.runner import Runner


class ExportedModel(Running):
    """An exported model in its runner."""

    def __init__(self, folder: Path, record: dict[str, Any], model: Runner) -> None:
        self.model = model
        self.name, self.notes = str(folder), list(record["notes"])
        self.dtype, self.weight_bytes = record["weights"], record["bytes"]
        self.parameters = sum(record["numbers"].values())
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        self.vocabulary, self.context = config["vocab_size"], config.get("max_position_embeddings")

    def round(self, ids: Tensor, new_tokens: int) -> Round:
        """See `Running.round`."""
        self.model.reset()
        start = time.perf_counter()
        logits = self.model.step(ids.numpy())
        prefill = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(new_tokens):
            logits = self.model.step(np.asarray(logits[:, -1].argmax(-1))[:, None])
        return Round(prefill, time.perf_counter() - start)


class ExportedEngine(Engine):
    """An engine for exported folders.

    Attributes:
        to: what `slimrank export --to` calls it.
    """

    to: ClassVar[str]

    def runner(self, folder: Path) -> Runner:
        """Return the runner of a folder."""
        raise NotImplementedError

    def load(self, model: str | Path, loading: Loading) -> Running:
        """See `Engine.load`.

        Raises:
            MissingExtraError: the engine is not installed.
            ModelError: a folder that `export` did not write, or wrote for another engine.
            RecipeError: another device than the CPU, or a dtype: the weights are those of the folder.
        """
        need(self.id, f"the engine {self.id}")
        if loading.device not in ("auto", "cpu") or loading.dtype != "auto":
            raise RecipeError(
                f"the engine {self.id} runs on the CPU, with the weights of the folder.",
                "leave out --device and --dtype",
            )
        folder = Path(model)
        return ExportedModel(folder, self._record(folder), self.runner(folder))

    def versions(self) -> dict[str, str]:
        """See `Engine.versions`."""
        return {self.id: importlib.metadata.version(self.id)}

    def _record(self, folder: Path) -> dict[str, Any]:
        hint = f"slimrank export MODEL --to {self.to} --out DIR, for both"
        if not (folder / RECORD).is_file():
            raise ModelError(f"'{folder}' is not an exported model.", hint)
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["engine"] != self.to:
            raise ModelError(f"'{folder}' was exported to {record['engine']}, not to {self.to}.", hint)
        return record
