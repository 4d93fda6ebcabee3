"""OpenVINO on the CPU, for folders that `slimrank export` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from slimrank.evaluate.engine import ENGINES
from slimrank.evaluate.exported import ExportedEngine
from slimrank.exporting.openvino.runner import OpenVinoModel
from slimrank.exporting.runner import Runner


@ENGINES.add
class OpenVino(ExportedEngine):
    """Exported models, computed in the precision that OpenVINO prefers."""

    id: ClassVar[str] = "openvino"
    title: ClassVar[str] = "OpenVINO, for folders of slimrank export"
    to: ClassVar[str] = "openvino"

    def runner(self, folder: Path) -> Runner:
        """See `ExportedEngine.runner`."""
        return OpenVinoModel(folder, precision="auto")
