"""Weights of few bits in an ONNX model: slimrank's own integers as they are, and others to the nearest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slimrank.exporting.engine import need
from slimrank.exporting.onnx.blocks import NARROW, WIDE, Blocks, own_blocks, rounded
from slimrank.exporting.onnx.graph import LAYER
from slimrank.exporting.onnx.numbers import add_tensor, is_matrix
from slimrank.layers.base import CompressedLinear
from slimrank.layers.quantized import quantized_layers

DOMAIN = "com.microsoft"
INPUTS_IN_8_BITS = 4  # the accuracy level of ONNX Runtime that is faster than float32
PURPOSE = "rounding weights"
FOR_PIVOTS = "4 bits destroy layers that keep rows of the weight (pivot layers)"


@dataclass
class Rounded:
    """What became of the weights.

    Attributes:
        own: layers that keep the integers of slimrank.
        wide: paths of the linear layers in 8 bits though 4 were asked for, by reason.
        left: paths of the layers of integers that are written as numbers of floating point.
    """

    own: int = 0
    wide: dict[str, list[str]] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


def round_weights(graph: Any, model: Any, bits: int) -> Rounded:
    """Round linear layers to 4 or 8 bits, and embeddings and the head to 8; layers of integers keep theirs.

    Args:
        graph: model of onnx_ir, changed in place.
        model: what it was made from.
        bits: 4 or 8.
    """
    ir, choice = need("onnx_ir", PURPOSE), _Choice(model, bits)
    graph.opset_imports[DOMAIN] = 1
    embeddings: list[tuple[Any, Any]] = []
    for node in list(graph.graph):
        weight = _weight_of(node)
        blocks = None if weight is None else choice.blocks(node.metadata_props[LAYER], weight)
        if blocks is not None:
            _put_product(ir, graph, node, blocks, embeddings)
        elif _reads_rows(node):
            embeddings.append(_put_rows(ir, graph, node))
    ir.passes.common.RemoveUnusedNodesPass()(graph)
    return choice.found


class _Choice:
    """Chooses how each layer is rounded, and keeps a record."""

    def __init__(self, model: Any, bits: int) -> None:
        self.bits, self.found, self.own = bits, Rounded(), quantized_layers(model)
        modules = dict(model.named_modules())
        head = model.get_output_embeddings()
        self.head = next((path for path, module in modules.items() if module is head), None)
        self.fragile = {p for p, m in modules.items() if isinstance(m, CompressedLinear) and m.least_nearest > NARROW}

    def blocks(self, path: str, weight: np.ndarray) -> Blocks | None:
        """Return the integers of a layer; None if its weight stays as it is."""
        if path not in self.own:
            return rounded(weight, self._bits(path))
        own = own_blocks(self.own[path])
        self.found.own += own is not None
        self.found.left += [path] if own is None else []
        return own

    def _bits(self, path: str) -> int:
        if self.bits == WIDE or path == self.head:
            return WIDE
        if path.rpartition(".")[0] in self.fragile or path in self.fragile:
            self.found.wide.setdefault(FOR_PIVOTS, []).append(path)
            return WIDE
        return NARROW


def _weight_of(node: Any) -> np.ndarray | None:
    """Return the weight (rows x columns) of a linear layer whose product a node is; None for other nodes."""
    if LAYER not in node.metadata_props:
        return None
    value, turned = node.inputs[1], node.op_type == "Gemm" and node.attributes["transB"].as_int() == 1
    before = value.producer()
    if before is not None and before.op_type == "Transpose":
        value, turned = before.inputs[0], not turned
    if value.const_value is None:
        return None
    array = value.const_value.numpy()
    return array if turned else array.T


def _put_product(ir: Any, graph: Any, node: Any, blocks: Blocks, embeddings: list[tuple[Any, Any]]) -> None:
    """Replace the product of a layer by one with its integers."""
    name, packed = node.outputs[0].name, blocks.packed_zeros()
    tied = next((pair for pair in embeddings if _hold(*pair, blocks)), None)
    scales = tied[1] if tied else add_tensor(ir, graph, f"{name}.scales", blocks.scales)
    codes = _reshaped(ir, graph, *tied, name) if tied else add_tensor(ir, graph, f"{name}.codes", blocks.packed())
    zeros = None if packed is None else add_tensor(ir, graph, f"{name}.zeros", packed)
    bias = node.inputs[2] if node.op_type == "Gemm" else None
    sizes = {"N": len(blocks.codes), "K": blocks.columns, "bits": blocks.bits, "block_size": blocks.block}
    product = ir.node(
        "MatMulNBits", [node.inputs[0], codes, scales, zeros, None, bias],
        attributes={**sizes, "accuracy_level": INPUTS_IN_8_BITS}, domain=DOMAIN,
    )  # fmt: skip
    _replace(ir, graph, node, product)


def _hold(codes: Any, scales: Any, blocks: Blocks) -> bool:
    """Tell whether an embedding holds these blocks, as that of a tied head does."""
    if blocks.bits != WIDE or blocks.zeros is not None or codes.const_value.size != blocks.codes.size:
        return False
    same = np.array_equal(codes.const_value.numpy().ravel(), blocks.codes.ravel())
    return same and np.array_equal(scales.const_value.numpy(), blocks.scales)


def _reshaped(ir: Any, graph: Any, codes: Any, scales: Any, name: str) -> Any:
    """Return the codes of an embedding (rows x columns) as those of a product: rows x blocks x columns of a block."""
    shape = add_tensor(ir, graph, f"{name}.shape", np.array([*scales.const_value.shape, -1]))
    node = ir.node("Reshape", [codes, shape])
    node.outputs[0].name = f"{name}.codes"
    graph.graph.insert_before(graph.graph[0], node)
    return node.outputs[0]


def _reads_rows(node: Any) -> bool:
    """Tell whether a node looks up rows of a matrix, as embeddings do."""
    return node.op_type == "Gather" and node.attributes["axis"].as_int() == 0 and is_matrix(node.inputs[0])


def _put_rows(ir: Any, graph: Any, node: Any) -> tuple[Any, Any]:
    """Replace a look-up in an embedding by one in its integers of 8 bits; return these, and their scales."""
    weight, name = node.inputs[0].const_value.numpy(), node.outputs[0].name
    blocks = rounded(weight, WIDE)
    codes = add_tensor(ir, graph, f"{name}.codes", blocks.packed().reshape(len(weight), -1)[:, : blocks.columns])
    scales = add_tensor(ir, graph, f"{name}.scales", blocks.scales)
    sizes = {"bits": WIDE, "block_size": blocks.block, "gather_axis": 0, "quantize_axis": 1}
    rows = ir.node("GatherBlockQuantized", [codes, node.inputs[1], scales], attributes=sizes, domain=DOMAIN)
    _replace(ir, graph, node, rows)
    return codes, scales


def _replace(ir: Any, graph: Any, old: Any, new: Any) -> None:
    ir.convenience.replace_nodes_and_values(graph.graph, old, [old], [new], old.outputs, new.outputs)
