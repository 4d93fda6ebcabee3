"""A decoder as an ONNX model: names of inputs and outputs are those of Hugging Face Optimum."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from slimrank.errors import ModelError, first_line
from slimrank.exporting.cached_step import OTHER_ENGINE, CachedStep
from slimrank.exporting.onnx.runner import LOGITS, PAST, PRESENT

PURPOSE = "exporting to ONNX"
LAYER = "layer"  # under which a product names the layer that it is of
SCOPES = "pkg.torch.onnx.name_scopes"
PRODUCTS = ("MatMul", "Gemm")


def graph_of(step: CachedStep) -> Any:
    """Return the ONNX model of a step, as the library onnx_ir holds it; its weights are those of the step.

    Inputs are input_ids, attention_mask, position_ids (where the model takes them) and the keys and values of past
    tokens. Outputs are the logits, and the keys and values of all tokens.

    Raises:
        ModelError: ONNX lacks an operation of the model, or the trace does not follow it.
    """
    with step.traceable(), _quiet():
        try:
            made: Any = torch.onnx.export(
                step, step.example(), dynamo=True, dynamic_shapes=(_open_sizes(step),), verbose=False,
                input_names=[*step.inputs, *step.shape.names(PAST)],
                output_names=[LOGITS, *step.shape.names(PRESENT)],
            )  # fmt: skip
        except Exception as error:  # of the tracer and of the converter, which share no class
            what = type(step.decoder).__name__
            reason = first_line(error.__cause__ or error)
            raise ModelError(f"{what} cannot be exported: ONNX cannot hold it: {reason}", OTHER_ENGINE) from error
    _forget_origin(made.model)
    return made.model


def _open_sizes(step: CachedStep) -> tuple[dict[int, str], ...]:
    """Return for each input which of its sizes are open."""
    lengths = {"attention_mask": "total"}
    tokens = [{0: "batch", 1: lengths.get(name, "tokens")} for name in step.inputs]
    return (*tokens, *({0: "batch", 2: "past"} for _ in step.shape.sizes))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporter logs, e.g. of packages that it does not find."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _forget_origin(model: Any) -> None:
    """Drop what the exporter notes of every node, e.g. paths of source files; a product keeps the path of its layer."""
    for node in model.graph:
        path = _path_of(node)
        node.metadata_props.clear()
        if path is not None:
            node.metadata_props[LAYER] = path
        for value in node.outputs:
            value.metadata_props.clear()
    model.graph.metadata_props.clear()


def _path_of(node: Any) -> str | None:
    """Return the path in the model of the layer whose product a node is; None for other nodes."""
    scopes = node.metadata_props.get(SCOPES, "[]")
    names = [name.strip(" '\"") for name in scopes.strip("[]").split(",")]
    start = "decoder."
    linear = node.op_type in PRODUCTS and len(names) > 1 and names[-1].startswith(("linear", "addmm"))
    return names[-2].removeprefix(start) if linear and names[-2].startswith(start) else None
