"""OpenVINO: a model with its cache inside, as OpenVINO GenAI reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from slimrank.errors import first_line
from slimrank.exporting.cached_step import CachedStep
from slimrank.exporting.engine import need
from slimrank.exporting.openvino import few_bits
from slimrank.exporting.openvino.graph import PURPOSE, graph_of
from slimrank.exporting.openvino.runner import MODEL_FILE, OpenVinoModel
from slimrank.exporting.record import ExportRecord
from slimrank.exporting.runner import Runner
from slimrank.exporting.target import TARGETS, Target


@TARGETS.add
class OpenVino(Target):
    """Models of OpenVINO, whose weights NNCF rounds."""

    id: ClassVar[str] = "openvino"
    title: ClassVar[str] = "OpenVINO"

    def need(self, weights: str | None) -> str:
        """See `Target.need`."""
        ov = need("openvino", PURPOSE)
        if weights in ("int8", "int4"):
            need("nncf", few_bits.PURPOSE)
        return str(ov.__version__.split("-")[0])

    def convert(self, step: CachedStep) -> Any:
        """See `Target.convert`."""
        return graph_of(step)

    def runner(self, graph: Any | Path) -> Runner:
        """See `Target.runner`."""
        return OpenVinoModel(graph)

    def with_weights(self, graph: Any, model: Any, record: ExportRecord) -> Any:
        """See `Target.with_weights`."""
        record.own_integers = few_bits.put_own_integers(need("openvino", PURPOSE), graph, model)
        if record.weights in ("int8", "int4"):
            graph, wide = few_bits.round_weights(graph, model, int(record.weights[3:]))
            record.add_wide(wide)
        return graph

    def write(self, graph: Any, tokenizer: Any, folder: Path, record: ExportRecord) -> None:
        """See `Target.write`."""
        ov = need("openvino", PURPOSE)
        ov.save_model(graph, folder / MODEL_FILE, compress_to_fp16=record.weights != "float32")
        record.numbers = dict(few_bits.numbers_by_type(ov.Core().read_model(folder / MODEL_FILE)))
        record.bytes = sum(path.stat().st_size for path in folder.glob("openvino_model.*"))

    def write_tokenizer(self, tokenizer: Any, folder: Path) -> list[str]:
        """Write the tokenizer as OpenVINO models, which OpenVINO GenAI reads; return a note if that is not possible."""
        try:
            converter = need("openvino_tokenizers", "a tokenizer of OpenVINO")
            made = converter.convert_tokenizer(tokenizer, with_detokenizer=True)
        except Exception as error:  # some tokenizers have no form there, and say so in many ways
            return [f"OpenVINO GenAI has no tokenizer for this model, so give it tokens: {first_line(error)}"]
        for graph, name in zip(made, ("tokenizer", "detokenizer"), strict=True):
            need("openvino", PURPOSE).save_model(graph, folder / f"openvino_{name}.xml")
        return []
