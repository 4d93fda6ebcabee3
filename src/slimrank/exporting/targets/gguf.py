"""GGUF: a dense model as llama.cpp and its relatives read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from slimrank.errors import ModelError, RecipeError
from slimrank.exporting.cached_step import CachedStep
from slimrank.exporting.engine import need, version_of
from slimrank.exporting.gguf.file import MODEL_FILE, PURPOSE, TYPES, GgufModel
from slimrank.exporting.record import ExportRecord
from slimrank.exporting.runner import Runner
from slimrank.exporting.target import TARGETS, Target
from slimrank.layers.base import compressed_layers


@TARGETS.add
class Gguf(Target):
    """Files of GGUF, with weights of F32, F16 and Q8_0."""

    id: ClassVar[str] = "gguf"
    title: ClassVar[str] = "llama.cpp, written by gguf"

    def need(self, weights: str | None) -> str:
        """See `Target.need`.

        Raises:
            RecipeError: weights that are not written here.
        """
        if weights is not None and weights not in TYPES:
            raise RecipeError(
                f"GGUF files are written with weights of {', '.join(TYPES)}, not of {weights}.",
                "--weights float16, then llama-quantize",
            )
        need("gguf", PURPOSE)
        return version_of("gguf")

    def convert(self, step: CachedStep) -> Any:
        """See `Target.convert`.

        Raises:
            ModelError: it has compressed layers, or is of another architecture.
        """
        if compressed_layers(step.decoder):
            raise ModelError(
                "GGUF has no layers of factors or of slimrank's integers, and this model has some.",
                "slimrank narrow makes dense models; or --to openvino or onnx",
            )
        return GgufModel.of(step.decoder)

    def runner(self, graph: Any | Path) -> Runner:
        """See `Target.runner`."""
        from slimrank.exporting.gguf.read_back import ReadBack

        return ReadBack(graph)

    def with_weights(self, graph: Any, model: Any, record: ExportRecord) -> Any:
        """See `Target.with_weights`."""
        graph.weights = record.weights
        return graph

    def write(self, graph: Any, tokenizer: Any, folder: Path, record: ExportRecord) -> None:
        """See `Target.write`."""
        graph.write(folder / MODEL_FILE, tokenizer)
        record.numbers = {kind.lower(): count for kind, count in graph.numbers.items()}
        record.bytes = (folder / MODEL_FILE).stat().st_size
        if record.weights == "int8" and graph.numbers["F16"]:
            record.notes.append("rows that blocks of 32 numbers do not divide are written in float16")
