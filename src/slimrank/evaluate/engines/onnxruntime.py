"""ONNX Runtime on the CPU, for folders that `slimrank export` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from slimrank.evaluate.engine import ENGINES
from slimrank.evaluate.exported import ExportedEngine
from slimrank.exporting.onnx.runner import OnnxModel
from slimrank.exporting.runner import Runner


@ENGINES.add
class OnnxRuntime(ExportedEngine):
    """Exported models."""

    id: ClassVar[str] = "onnxruntime"
    title: ClassVar[str] = "ONNX Runtime, for folders of slimrank export"
    to: ClassVar[str] = "onnx"

    def runner(self, folder: Path) -> Runner:
        """See `ExportedEngine.runner`."""
        return OnnxModel(folder)
