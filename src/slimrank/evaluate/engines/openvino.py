"""OpenVINO on the CPU, for folders that `slimrank export` wrote."""

from __future__ import annotations

import importlib.metadata
import json
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import Tensor

from slimrank.errors import ModelError, RecipeError
from slimrank.evaluate.engine import ENGINES, Engine, Round, Running
from slimrank.evaluate.options import Loading
from slimrank.exporting.api import RECORD
from slimrank.exporting.engine import need
from slimrank.exporting.runner import OpenVinoModel


class ExportedModel(Running):
    """A compiled model, which computes in the precision that OpenVINO prefers."""

    def __init__(self, folder: Path) -> None:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        self.model = OpenVinoModel(folder, precision="auto")
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


@ENGINES.add
class OpenVino(Engine):
    """Exported models."""

    id: ClassVar[str] = "openvino"
    title: ClassVar[str] = "OpenVINO, for folders of slimrank export"

    def load(self, model: str | Path, loading: Loading) -> Running:
        """See `Engine.load`.

        Raises:
            MissingExtraError: OpenVINO is not installed.
            ModelError: a folder that `export` did not write.
            RecipeError: another device than the CPU, or a dtype: the weights are those of the folder.
        """
        need("openvino", "the engine openvino")
        if loading.device not in ("auto", "cpu") or loading.dtype != "auto":
            raise RecipeError(
                "the engine openvino runs on the CPU, with the weights of the folder.", "leave out --device and --dtype"
            )
        if not (Path(model) / RECORD).is_file():
            raise ModelError(
                f"'{model}' is not an exported model.", f"slimrank export {model} --to openvino --out DIR, for both"
            )
        return ExportedModel(Path(model))

    def versions(self) -> dict[str, str]:
        """See `Engine.versions`."""
        return {"openvino": importlib.metadata.version("openvino")}
