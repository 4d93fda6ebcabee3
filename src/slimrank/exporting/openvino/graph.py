"""A decoder as an OpenVINO model with its cache inside: inputs and output are named as OpenVINO GenAI expects."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from slimrank.errors import ModelError, first_line
from slimrank.exporting.cached_step import OTHER_ENGINE, CachedStep
from slimrank.exporting.engine import need

PURPOSE = "exporting to OpenVINO"
BEAM = "beam_idx"
OUTPUT = "logits"
PAST, PRESENT = "past_key_values", "present"


def graph_of(step: CachedStep) -> Any:
    """Return a stateful OpenVINO model of a step.

    Inputs are input_ids, attention_mask, position_ids (where the model takes them) and beam_idx: for each text, which
    text of the batch before it continues. The output is logits.

    Raises:
        ModelError: OpenVINO lacks an operation of the model.
    """
    ov = need("openvino", PURPOSE)
    graph = _converted(ov, step)
    _name(ov, graph, step)
    _reorder(ov, graph)
    _keep_state(ov, graph, step)
    return graph


def _converted(ov: Any, step: CachedStep) -> Any:
    with step.traceable():
        try:
            return ov.convert_model(step, example_input=step.example())
        except Exception as error:  # of the tracer and of the front end, which share no class
            raise ModelError(
                f"{type(step.decoder).__name__} cannot be exported: {_reason(error)}", OTHER_ENGINE
            ) from error


def _reason(error: Exception) -> str:
    missing = re.search(r"(?:No conversion rule found|Conversion is failed) for(?: operations)?: (.+)", str(error))
    if missing:
        return f"OpenVINO has no form of its operations {missing.group(1).strip()}."
    return f"OpenVINO cannot convert it: {first_line(error)}"


def _name(ov: Any, graph: Any, step: CachedStep) -> None:
    """Name inputs and outputs, and leave batch and lengths open.

    Raises:
        ModelError: conversion has left some out.
    """
    names = [*step.inputs, *step.shape.names(PAST)]
    outputs = [OUTPUT, *step.shape.names(PRESENT)]
    if len(graph.inputs) != len(names) or len(graph.outputs) != len(outputs):
        raise ModelError(
            f"{type(step.decoder).__name__} cannot be exported: of its {len(names)} inputs and {len(outputs)} outputs "
            f"conversion has kept {len(graph.inputs)} and {len(graph.outputs)}.",
            OTHER_ENGINE,
        )
    sizes = [[-1, -1]] * len(step.inputs) + [[-1, heads, -1, width] for heads, width in step.shape.sizes]
    for port, name, size in zip(graph.inputs, names, sizes, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
        port.get_node().set_partial_shape(ov.PartialShape(size))
    for port, name in zip(graph.outputs, outputs, strict=True):
        port.get_tensor().set_names({name})
    graph.validate_nodes_and_infer_types()


def _reorder(ov: Any, graph: Any) -> None:
    """Take from the old cache, for each text, the rows that `beam_idx` names."""
    ops = ov.opset13
    beam = ops.parameter([-1], dtype=np.int32, name=BEAM)
    beam.output(0).get_tensor().set_names({BEAM})
    for port in graph.inputs:
        if not port.get_any_name().startswith(PAST):
            continue
        readers = port.get_target_inputs()
        chosen = ops.gather(port, beam, ops.constant(0))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    graph.add_parameters([beam])
    graph.validate_nodes_and_infer_types()


def _keep_state(ov: Any, graph: Any, step: CachedStep) -> None:
    """Turn keys and values from inputs and outputs into state, which is empty for a new text."""
    from openvino._offline_transformations import apply_make_stateful_transformation

    pairs = dict(zip(step.shape.names(PAST), step.shape.names(PRESENT), strict=True))
    apply_make_stateful_transformation(graph, pairs)
    ops = ov.opset13
    texts = ops.gather(
        ops.shape_of(graph.input("input_ids"), output_type="i64"), ops.constant(np.array([0])), ops.constant(0)
    )
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            _, heads, _, width = node.get_output_partial_shape(0)
            rest = [ops.constant(np.array(part)) for part in ([heads.get_length()], [0], [width.get_length()])]
            shape = ops.concat([texts, *rest], axis=0)
            zero = ops.constant(0, dtype=node.get_output_element_type(0))
            node.set_arguments([ops.broadcast(zero, shape)])
    graph.validate_nodes_and_infer_types()
