"""Run a model that was exported to ONNX: a thin runner that needs onnxruntime and numpy only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from slimrank.exporting.engine import need
from slimrank.exporting.runner import PURPOSE, Runner, model_in

MODEL_FILE = "model.onnx"
PAST, PRESENT, LOGITS = "past_key_values", "present", "logits"  # as Hugging Face Optimum names them


class OnnxModel(Runner):
    """A model that `slimrank export` wrote as ONNX, in ONNX Runtime on the CPU.

    Args:
        folder: what `export` wrote.
        threads: of the processor; all by default.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        ModelError: the folder holds no exported model.
    """

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        engine = need("onnxruntime", PURPOSE)
        file = model_in(Path(folder), MODEL_FILE)
        super().__init__(file)
        options = engine.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        self._start(engine, file, options)

    def _start(self, engine: Any, model: Path | bytes, options: Any) -> None:
        self._engine = engine
        self.session = engine.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        ports = {port.name: port.shape for port in self.session.get_inputs()}
        self.names = set(ports)
        self._sizes = {name: (shape[1], shape[3]) for name, shape in ports.items() if name.startswith(PAST)}
        self._outputs = [LOGITS, *(name.replace(PAST, PRESENT) for name in self._sizes)]
        self.reset()

    def _forget(self) -> None:
        self._cache: dict[str, Any] = {}

    def _compute(self, given: dict[str, np.ndarray], beams: np.ndarray) -> np.ndarray:
        tokens = {name: self._value(array) for name, array in given.items()}
        found = self.session.run_with_ort_values(self._outputs, {**tokens, **self._past(beams)})
        self._cache = dict(zip(self._sizes, found[1:], strict=True))
        return np.asarray(found[0].numpy())

    def _past(self, beams: np.ndarray) -> dict[str, Any]:
        """Return keys and values of past tokens, for each text those of the one that it continues."""
        if not self._cache:
            empty = {name: (len(beams), heads, 0, width) for name, (heads, width) in self._sizes.items()}
            return {name: self._value(np.zeros(shape, np.float32)) for name, shape in empty.items()}
        if self._same(beams):
            return self._cache
        return {name: self._value(np.ascontiguousarray(v.numpy()[beams])) for name, v in self._cache.items()}

    def _same(self, beams: np.ndarray) -> bool:
        """Tell whether each text continues itself."""
        texts = next(iter(self._cache.values())).shape()[0]
        return np.array_equal(beams, np.arange(texts))

    def _value(self, array: np.ndarray) -> Any:
        return self._engine.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
