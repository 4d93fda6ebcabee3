"""Weights of few bits in an OpenVINO model: slimrank's own integers as they are, and NNCF's for the others."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

import numpy as np

from slimrank.exporting.engine import need
from slimrank.layers.base import CompressedLinear
from slimrank.layers.quantized import QuantizedLinear, quantized_layers

GROUP = 64  # columns that share a scale, in 4 bits
NARROW, WIDE = 4, 8
COUNTED = ("f32", "f16", "bf16", "i8", "u8", "i4", "u4")  # types of weights; others are of indices
PURPOSE = "rounding weights"
FOR_PIVOTS = "4 bits destroy layers that keep rows of the weight (pivot layers)"
FOR_GROUPS = f"{GROUP} does not divide their columns"


def put_own_integers(ov: Any, graph: Any, model: Any) -> int:
    """Replace the weights of slimrank's layers of few bits by their integers; return how many layers these are.

    Up to 4 bits take 4, more take 8. What is computed stays the same.

    Args:
        ov: the package openvino.
        graph: changed in place.
        model: what it was made from.
    """
    weights = weights_of(graph)
    done: dict[str, Any] = {}
    for path, layer in quantized_layers(model).items():
        constant = weights.get(path)
        if constant is None:
            continue
        name = constant.get_friendly_name()
        if name not in done:
            readers = constant.output(0).get_target_inputs()
            done[name] = _integers(ov, layer, constant.get_element_type())
            for reader in readers:
                reader.replace_source_output(done[name].output(0))
    return len(done)


def weights_of(graph: Any) -> dict[str, Any]:
    """Return the constants that products of linear layers read, by the path of the layer in the model."""
    found = {}
    for node in graph.get_ops():
        path = path_of(node)
        if path is not None:
            constant = node.input_value(1).get_node()
            if constant.get_type_name() == "Constant":
                found[path] = constant
    return found


def path_of(node: Any) -> str | None:
    """Return the path in the model of the linear layer whose product a node is; None for other nodes."""
    first, _, rest = node.get_friendly_name().partition("/")
    start = "__module.decoder."
    linear = node.get_type_name() == "MatMul" and rest.startswith(("aten::linear", "aten::addmm"))
    return first.removeprefix(start) if linear and first.startswith(start) else None


def _integers(ov: Any, layer: QuantizedLinear, dtype: Any) -> Any:
    """Return the node that computes a weight from its integers: (integers - zero points) * scales."""
    ops, scheme = ov.opset13, layer.scheme
    narrow, signed = scheme.bits <= NARROW, layer.weight_zero_point is None
    kind = getattr(ov.Type, f"{'i' if signed else 'u'}{NARROW if narrow else WIDE}")
    rows, columns = layer.out_features, layer.in_features
    together = scheme.columns(columns)
    grouped = together < columns
    shape = (rows, columns // together, together) if grouped else (rows, columns)
    few = (*shape[:-1], 1)
    shift = 0 if signed else 1 << (NARROW - 1 if narrow else WIDE - 1)

    def constant(codes: Any) -> Any:
        numbers = codes.cpu().numpy().astype(np.int16) + shift
        return ops.constant(numbers.astype(np.int8 if signed else np.uint8), dtype=kind)

    node = ops.convert(constant(layer.codes().view(shape)), dtype)
    if layer.weight_zero_point is not None:
        node = ops.subtract(node, ops.convert(constant(layer.weight_zero_point.view(few)), dtype))
    node = ops.multiply(node, ops.constant(layer.weight_scale.detach().float().view(few).cpu().numpy(), dtype=dtype))
    return ops.reshape(node, ops.constant(np.array([rows, columns])), False) if grouped else node


def round_weights(graph: Any, model: Any, bits: int) -> tuple[Any, dict[str, list[str]]]:
    """Round the weights of a model that are still numbers, by NNCF: to the nearest, without data.

    In 8 bits: all matrices, with a scale and a zero point for each row (INT8_ASYM). In 4 bits: those of linear layers,
    with a scale for each 64 columns (INT4_SYM). Embeddings, the head, and layers that 4 bits do not fit get 8.

    Args:
        graph: OpenVINO model.
        model: what it was made from.
        bits: 4 or 8.

    Returns:
        The rounded model; and the paths of the linear layers that stay in 8 bits though 4 were asked for, by reason.
    """
    nncf = need("nncf", PURPOSE)
    nncf.set_log_level(logging.ERROR)
    wide = wide_layers(graph, model) if bits == NARROW else {}
    with redirect_stdout(io.StringIO()):  # its bars
        if bits == NARROW:
            kept = {path for paths in wide.values() for path in paths}
            names = [node.get_friendly_name() for node in graph.get_ops() if path_of(node) in kept]
            scope = nncf.IgnoredScope(names=names, validate=False)
            mode = nncf.CompressWeightsMode.INT4_SYM
            graph = nncf.compress_weights(graph, mode=mode, group_size=GROUP, ratio=1.0, ignored_scope=scope)
        graph = nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_ASYM)
    return graph, wide


def wide_layers(graph: Any, model: Any) -> dict[str, list[str]]:
    """Return the linear layers that are rounded to 8 bits where 4 are asked for, by reason."""
    fragile = [
        path
        for path, module in model.named_modules()
        if isinstance(module, CompressedLinear) and module.least_nearest > NARROW
    ]
    found: dict[str, list[str]] = {}
    head = model.get_output_embeddings()  # NNCF leaves it in 8 bits by itself
    for path, constant in weights_of(graph).items():
        if model.get_submodule(path) is head:
            continue
        if path.rpartition(".")[0] in fragile or path in fragile:
            found.setdefault(FOR_PIVOTS, []).append(path)
        elif list(constant.get_output_shape(0))[-1] % GROUP:
            found.setdefault(FOR_GROUPS, []).append(path)
    return found


def numbers_by_type(graph: Any) -> Mapping[str, int]:
    """Count the numbers of all matrices by their type, e.g. i4, u8 and f32; scales have a last size of 1."""
    found: dict[str, int] = {}
    for node in graph.get_ops():
        shape = list(node.get_output_shape(0)) if node.get_type_name() == "Constant" else []
        kind = node.get_element_type().get_type_name() if shape else ""
        if kind in COUNTED and len(shape) > 1 and min(shape[0], shape[-1]) > 1:
            found[kind] = found.get(kind, 0) + int(np.prod(shape))
    return dict(sorted(found.items()))
