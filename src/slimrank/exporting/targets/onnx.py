"""ONNX: a model with its cache as inputs and outputs, which ONNX Runtime runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from slimrank.exporting.cached_step import CachedStep
from slimrank.exporting.engine import LEAST, need
from slimrank.exporting.onnx.few_bits import round_weights
from slimrank.exporting.onnx.graph import PURPOSE, graph_of
from slimrank.exporting.onnx.in_memory import InMemoryModel
from slimrank.exporting.onnx.numbers import halve, numbers_by_type
from slimrank.exporting.onnx.runner import MODEL_FILE, OnnxModel
from slimrank.exporting.record import ExportRecord
from slimrank.exporting.runner import Runner
from slimrank.exporting.target import TARGETS, Target
from slimrank.layers.quantized import quantized_layers

NO_BLOCKS = "16 does not divide their groups of columns"
DATA_FILE = f"{MODEL_FILE}_data"  # one file of ONNX holds 2 GB at most


@TARGETS.add
class Onnx(Target):
    """Models of ONNX, with operations of ONNX Runtime for weights of few bits."""

    id: ClassVar[str] = "onnx"
    title: ClassVar[str] = "ONNX Runtime"

    def need(self, weights: str | None) -> str:
        """See `Target.need`."""
        found = {name: need(name, PURPOSE) for name in LEAST["onnx"]}
        return str(found["onnxruntime"].__version__)

    def convert(self, step: CachedStep) -> Any:
        """See `Target.convert`."""
        return graph_of(step)

    def runner(self, graph: Any | Path) -> Runner:
        """See `Target.runner`."""
        return OnnxModel(graph) if isinstance(graph, Path) else InMemoryModel(graph)

    def with_weights(self, graph: Any, model: Any, record: ExportRecord) -> Any:
        """See `Target.with_weights`."""
        if record.weights in ("int8", "int4"):
            found = round_weights(graph, model, int(record.weights[3:]))
            record.own_integers = found.own
            record.add_wide(found.wide)
            record.notes += _note(len(found.left), NO_BLOCKS)
        else:
            record.notes += _note(len(quantized_layers(model)), "--weights int8 or int4 keeps them")
        if record.weights == "float16":
            halve(graph)
        return graph

    def write(self, graph: Any, tokenizer: Any, folder: Path, record: ExportRecord) -> None:
        """See `Target.write`."""
        need("onnx_ir", PURPOSE).save(graph, folder / MODEL_FILE, external_data=DATA_FILE)
        record.numbers = numbers_by_type(graph)
        record.bytes = sum((folder / name).stat().st_size for name in (MODEL_FILE, DATA_FILE))


def _note(layers: int, why: str) -> list[str]:
    return [f"{layers} layers of integers are written as numbers of floating point: {why}"] if layers else []
