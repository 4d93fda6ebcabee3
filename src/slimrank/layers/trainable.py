"""Which parameters of a compressed model are trained, and the two parts of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn

from slimrank.errors import ModelError
from slimrank.layers.base import CompressedLinear, compressed_layers
from slimrank.layers.low_rank import LowRankLinear
from slimrank.layers.pivot import PivotLinear

Part = Literal["A", "B"]
Balance = Annotated[
    bool, Field(description="Train pairs and pivots as pairs of balanced factors; they keep their form and product.")
]


def train_only(model: nn.Module, wanted: Callable[[str], bool]) -> None:
    """Let only the parameters of these names have gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted(name))


def outside_vocabulary(model: Any) -> set[str]:
    """Return the names of all parameters but those of the embeddings and the output head."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    kept = {id(p) for table in tables if table is not None for p in table.parameters()}
    return {name for name, p in model.named_parameters() if id(p) not in kept}


def parts(model: nn.Module, which: Iterable[Part]) -> list[str]:
    """Return the paths of the linear layers that are the parts of compressed layers: A reads the inputs, B follows.

    Raises:
        ModelError: a layer of another kind than pairs and pivots, or no compressed layer.
    """
    wanted = list(which)
    found = [f"{path}.{_part(path, layer, p)}" for path, layer in compressed_layers(model).items() for p in wanted]
    if not found:
        raise ModelError("the model has no compressed layers to train.", "slimrank compress MODEL --keep 0.8 first")
    return found


def _part(path: str, layer: CompressedLinear, part: Part) -> str:
    if type(layer) is LowRankLinear:
        return part
    if type(layer) is PivotLinear:
        return "skeleton" if (part == "A") == (layer.side == "out") else "interpolation"
    raise ModelError(f"'{path}' is of the kind '{layer.kind}', which has no parts A and B.", "--method distill")
