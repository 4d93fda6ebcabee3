"""The weight of a dense layer, whichever way round it is stored."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight as m x n = out x in, a view (a Conv1D stores the transpose)."""
    weight: Tensor = module.weight.data  # type: ignore[assignment]
    return weight.t() if isinstance(module, Conv1D) else weight


def answers_linearly(layer: nn.Module) -> bool:
    """Tell whether a linear layer answers W x + b.

    A class with a `forward` of its own may do anything else: it is tried with weights made up, since those that it has
    may be on the meta device.
    """
    if type(layer).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    draw = torch.Generator().manual_seed(0)
    made = {name: torch.randn(p.shape, generator=draw) for name, p in layer.named_parameters()}
    weight = made["weight"].t() if isinstance(layer, Conv1D) else made["weight"]
    x = torch.randn(2, 3, weight.shape[1], generator=draw)
    expected = x @ weight.t() + made.get("bias", torch.zeros(()))
    try:
        with torch.no_grad():
            found = functional_call(layer, made, (x,))
    except Exception:  # whatever a class needs beside its weights, then it is not a plain linear layer
        return False
    close = isinstance(found, Tensor) and found.shape == expected.shape
    return close and bool(torch.allclose(found.float(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())))
