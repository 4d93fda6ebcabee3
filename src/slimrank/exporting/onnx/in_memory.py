"""Run an ONNX model that is in memory, however large: ONNX Runtime reads its weights where they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from slimrank.exporting.engine import need
from slimrank.exporting.onnx.runner import OnnxModel
from slimrank.exporting.runner import PURPOSE, Runner

SMALL = 1024  # bytes: tensors up to here are part of the model


class InMemoryModel(OnnxModel):
    """The runner of a model of onnx_ir, which stays as it is.

    A model as one piece of bytes cannot have 2 GB. So it names its weights as if they were in a file, and the session
    gets them beside it.
    """

    def __init__(self, model: Any) -> None:
        Runner.__init__(self, None)
        engine, ir = need("onnxruntime", PURPOSE), need("onnx_ir", PURPOSE)
        weights = {name: v.const_value for name, v in model.graph.initializers.items() if v.const_value.nbytes > SMALL}
        with _elsewhere(ir, model, weights):
            content = ir.serde.serialize_model(model).SerializeToString()
        arrays = [np.ascontiguousarray(tensor.numpy()) for tensor in weights.values()]
        self._weights = [
            engine.OrtValue.ortvalue_from_numpy(array) for array in arrays
        ]  # the session does not own them
        options = engine.SessionOptions()
        options.add_external_initializers(list(weights), self._weights)
        self._start(engine, content, options)


@contextmanager
def _elsewhere(ir: Any, model: Any, weights: dict[str, Any]) -> Iterator[None]:
    """Put references for weights, and the weights back afterwards."""
    offset = 0
    try:
        for name, tensor in weights.items():
            place = ir.ExternalTensor("memory", offset, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name)
            model.graph.initializers[name].const_value = place
            offset += tensor.nbytes
        yield
    finally:
        for name, tensor in weights.items():
            model.graph.initializers[name].const_value = tensor
