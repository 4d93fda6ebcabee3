"""Types of the weights in an ONNX model: count them, and store them in float16."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from slimrank.exporting.engine import need

KINDS = {"FLOAT": "f32", "FLOAT16": "f16", "BFLOAT16": "bf16"}
PURPOSE = "storing weights"


def halve(model: Any) -> None:
    """Store all matrices in float16. ONNX Runtime converts them when it loads them, and computes in float32."""
    ir = need("onnx_ir", PURPOSE)
    for value in matrices(model):
        readers = tuple(value.uses())
        stored = add_tensor(ir, model, f"{value.name}.half", value.const_value.numpy().astype(np.float16))
        whole = ir.Value(name=f"{value.name}.whole", shape=value.shape, type=value.type)
        model.graph.insert_before(model.graph[0], ir.node("Cast", [stored], {"to": value.dtype}, outputs=[whole]))
        for node, index in readers:
            node.replace_input_with(index, whole)
        del model.graph.initializers[value.name]


def add_tensor(ir: Any, model: Any, name: str, array: np.ndarray) -> Any:
    """Add a tensor to the weights of a model, and return its value."""
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def is_matrix(value: Any) -> bool:
    """Tell whether a value is a constant matrix of numbers; scales of integers are none."""
    if value.const_value is None or value.dtype.name not in KINDS or len(value.shape) < 2:
        return False
    scales = any(node.op_type in BLOCKS for node, _ in value.uses())
    return min(value.shape[0], value.shape[-1]) > 1 and not scales


def matrices(model: Any) -> list[Any]:
    """Return the weights that are matrices of numbers."""
    return [value for value in model.graph.initializers.values() if is_matrix(value)]


def numbers_by_type(model: Any) -> dict[str, int]:
    """Count the numbers of all matrices by their type, e.g. u4, u8 and f32."""
    found: Counter[str] = Counter()
    for value in matrices(model):
        found[KINDS[value.dtype.name]] += value.const_value.size
    for node in model.graph:
        if node.op_type in BLOCKS:
            found[f"u{node.attributes['bits'].as_int()}"] += BLOCKS[node.op_type](node)
    return dict(sorted(found.items()))


def _of_a_product(node: Any) -> int:
    if node.inputs[1].const_value is None:  # those of an embedding
        return 0
    return int(node.attributes["N"].as_int() * node.attributes["K"].as_int())


def _of_rows(node: Any) -> int:
    return int(node.inputs[0].const_value.size)


BLOCKS = {"MatMulNBits": _of_a_product, "GatherBlockQuantized": _of_rows}  # operations with integers -> how many
