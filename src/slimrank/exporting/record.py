"""What was exported: the content of export.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

RECORD = "export.json"


@dataclass
class ExportRecord:
    """What was exported; the content of export.json.

    Attributes:
        model: as the user named it.
        engine: "openvino", "onnx" or "gguf".
        engine_version: of what runs it (OpenVINO or ONNX Runtime), or wrote it (gguf).
        weights: what was asked for: float32, float16, int8 or int4.
        numbers: numbers of the weights by the type that they are stored in, e.g. {"u8": 134515008}.
        bytes: of the model's files.
        difference: largest difference of logits from those of transformers, relative to the largest logit, in float32:
            "graph" with the weights of the model, "written" with those in the file.
        own_integers: layers whose integers slimrank had chosen, which are written as they are.
        wide: linear layers in 8 bits though 4 were asked for, by reason.
        notes: deviations that the user should know of.
    """

    model: str
    engine: str
    engine_version: str
    weights: str
    numbers: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    difference: dict[str, float] = field(default_factory=dict)
    own_integers: int = 0
    wide: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """Return the record as JSON holds it."""
        return asdict(self)

    def add_wide(self, layers: dict[str, list[str]]) -> None:
        """Count the layers that have 8 bits though 4 were asked for, given by reason, and note them."""
        self.wide = {reason: len(paths) for reason, paths in layers.items()}
        self.notes += [f"{len(paths)} linear layers have 8 bits: {reason}" for reason, paths in layers.items()]
