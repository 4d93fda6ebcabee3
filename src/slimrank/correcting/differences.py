"""A model that holds, beside each weight of a quantised one, what that lacks of the original's.

It computes what the linear layers would compute unquantised. If the pipeline compresses these differences as it
compresses weights, the quantised weights and the factors together are the corrected model.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from slimrank.errors import ModelError
from slimrank.layers.dense import weight_of
from slimrank.models.targets import TargetSet

DIFFERENCE = "difference"
OF_IT = "give the model that it was made of, as --original"


class Corrected(nn.Module):
    """y = Q x + E x + bias, with a fixed Q (out x in) and a difference E that may become two factors.

    Args:
        quantised: Q, as numbers.
        original: the layer that Q was made of; E is its weight without Q.
        bias: of the quantised layer.
    """

    base: Tensor
    bias: Tensor | None

    def __init__(self, quantised: Tensor, original: nn.Module, bias: Tensor | None) -> None:
        super().__init__()
        weight = weight_of(original).detach()
        self.register_buffer("base", quantised.to(weight))
        self.register_buffer("bias", None if bias is None else bias.detach().to(weight))
        self.out_features, self.in_features = weight.shape
        self.difference = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.difference.weight = nn.Parameter(weight - self.base)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., in) to (..., out)."""
        return linear(x, self.base, self.bias) + self.difference(x)


def with_differences(quantised: Any, original: Any, targets: TargetSet) -> Any:
    """Return a model with corrected layers, of the class of the original; all else is that of the quantised model.

    Args:
        quantised: its linear layers may be of any class that answers linearly.
        original: the model that it was made of.
        targets: of the original.

    Raises:
        ModelError: a weight is missing or has another shape, or the quantised model equals the original.
    """
    made = copy.deepcopy(original)
    layers = {name: module for name, module in original.named_modules() if _is_linear(module)}
    _copy_others(made, quantised, layers)
    paths = {name for target in targets for name in (target.path, *target.ties)}
    for name in layers.keys() - paths:
        _set(made, name, quantised)
    differs = False
    for target in targets:
        layer = layers[target.path]
        bias = getattr(quantised.get_submodule(target.path), "bias", None) if layer.bias is not None else None
        corrected = Corrected(_numbers(quantised, target.path, layer), layer, bias)
        differs |= bool(corrected.difference.weight.any())
        for name in (target.path, *target.ties):
            made.set_submodule(name, corrected)
    if not differs:
        raise ModelError("both models have the same weights: there is nothing to correct.", OF_IT)
    return made


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


@torch.no_grad()
def _copy_others(made: Any, quantised: Any, layers: dict[str, nn.Module]) -> None:
    """Copy all tensors outside linear layers: embeddings and norms may be quantised, too."""
    theirs = quantised.state_dict()
    for name, tensor in made.state_dict().items():
        if name.rpartition(".")[0] in layers:
            continue
        if name not in theirs or theirs[name].shape != tensor.shape:
            found = "is missing" if name not in theirs else f"is {_shape(theirs[name])}, not {_shape(tensor)},"
            raise ModelError(f"'{name}' {found} in the quantised model.", OF_IT)
        tensor.copy_(theirs[name])


@torch.no_grad()
def _set(made: Any, path: str, quantised: Any) -> None:
    """Give a linear layer that is not corrected the numbers of the quantised model.

    Raises:
        ModelError: it is an output head that shares its weight with the embedding, and the quantised one does not.
    """
    layer = made.get_submodule(path)
    numbers = _numbers(quantised, path, layer)
    stored = numbers.t() if isinstance(layer, Conv1D) else numbers
    if layer.weight is made.get_input_embeddings().weight and not torch.equal(layer.weight, stored.to(layer.weight)):
        raise ModelError(
            f"'{path}' shares its weight with the embedding in the original, and has another in the quantised model.",
            "quantise the model without its output head",
        )
    layer.weight.copy_(stored)
    bias = getattr(quantised.get_submodule(path), "bias", None)
    if layer.bias is not None and bias is not None:
        layer.bias.copy_(bias)


def _numbers(quantised: Any, path: str, original: nn.Module) -> Tensor:
    """Return the weight (m x n) that a layer of the quantised model applies.

    Raises:
        ModelError: there is none, or it has another shape.
    """
    shape = tuple(weight_of(original).shape)
    try:
        layer = quantised.get_submodule(path)
    except AttributeError as error:
        raise ModelError(f"the quantised model has no layer '{path}'.", OF_IT) from error
    found = weight_of(layer).detach() if type(layer) in (nn.Linear, Conv1D) else answers(layer, shape[1], path)
    if tuple(found.shape) != shape:
        raise ModelError(f"'{path}' is {_shape(found)} in the quantised model, not {_shape(original.weight)}.", OF_IT)  # type: ignore[arg-type]
    return found.float()


@torch.no_grad()
def answers(layer: nn.Module, n: int, path: str) -> Tensor:
    """Return the weight (m x n) of a layer of any class: its answers to the unit vectors, as exact as its products.

    Raises:
        ModelError: it cannot be called.
    """
    tensors = [*layer.parameters(), *layer.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    dtype = next((t.dtype for t in tensors if t.is_floating_point() and t.element_size() > 1), torch.float32)
    try:
        zero, units = torch.zeros(1, n, dtype=dtype, device=device), torch.eye(n, dtype=dtype, device=device)
        return (layer(units).float() - layer(zero).float()).t().cpu().contiguous()
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelError(
            f"the quantised layer '{path}' cannot be read as numbers: {error}",
            "a format that transformers runs on this machine",
        ) from error


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))
