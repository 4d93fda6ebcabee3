"""Run a model that was exported to OpenVINO: a thin runner that needs neither torch nor transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from slimrank.errors import RecipeError
from slimrank.exporting.engine import need
from slimrank.exporting.runner import PURPOSE, Runner, model_in

MODEL_FILE = "openvino_model.xml"
PRECISIONS = ("float32", "auto")
_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}


class OpenVinoModel(Runner):
    """A model that `slimrank export` wrote for OpenVINO, compiled for the CPU.

    Args:
        folder: what `export` wrote; or an OpenVINO model in memory.
        precision: "float32": activations and the cache are of float32. "auto": what OpenVINO prefers on this machine.
            That is faster and less exact: bfloat16 where the processor has it, a cache of 8 bits, and inputs of layers
            with 8-bit weights rounded to 8 bits.
        threads: of the processor; all by default.

    Raises:
        MissingExtraError: OpenVINO is not installed.
        ModelError: the folder holds no exported model.
        RecipeError: another precision.
    """

    def __init__(self, folder: str | Path | Any, precision: str = "float32", threads: int | None = None) -> None:
        if precision not in PRECISIONS:
            raise RecipeError(f"'{precision}' is not a precision.", f"one of {', '.join(PRECISIONS)}")
        ov = need("openvino", PURPOSE)
        file = model_in(Path(folder), MODEL_FILE) if isinstance(folder, (str, Path)) else None
        super().__init__(file)
        settings: dict[str, Any] = {"ENABLE_CPU_PINNING": False}  # a thread bound to a core that is busy waits for it
        settings |= _EXACT if precision == "float32" else {}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        self.compiled = ov.Core().compile_model(folder if file is None else file, "CPU", settings)
        self.names = {name for port in self.compiled.inputs for name in port.get_names()}
        self._request = self.compiled.create_infer_request()
        self.reset()

    def _forget(self) -> None:
        self._request.reset_state()

    def _compute(self, given: dict[str, np.ndarray], beams: np.ndarray) -> np.ndarray:
        return np.array(self._request.infer({**given, "beam_idx": beams})["logits"])
