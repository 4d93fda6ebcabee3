"""One linear layer as several. Copied into saved models; imports nothing but torch.

Some models keep q, k and v, or gate and up, in one weight, one after the other. As `SplitLinear` every range of its
outputs is an `nn.Linear` of its own, which can be measured, replaced and saved like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slimrank.layers.transforms import Transform


class SplitLinear(nn.Module):
    """y = cat(part_0(x), part_1(x), ...).

    Attributes:
        sizes: outputs of each part.
        native: the layer that was split, no submodule, without its weight and bias.

    Args:
        native: an `nn.Linear`, or a `Conv1D` of transformers; loses its weight and bias, which may be on the meta
            device.
        sizes: outputs of each part; they add up to those of the layer.
    """

    def __init__(self, native: nn.Module, sizes: Sequence[int]) -> None:
        super().__init__()
        weight, bias = native.get_parameter("weight"), native.bias
        rows = weight.data if isinstance(native, nn.Linear) else weight.data.t()
        for number, (start, end) in enumerate(pairwise([0, *accumulate(sizes)])):
            part = nn.Linear(rows.shape[1], end - start, bias=bias is not None, device="meta")
            part.weight = nn.Parameter(rows[start:end].contiguous(), weight.requires_grad)
            if isinstance(bias, Tensor):
                part.bias = nn.Parameter(bias.data[start:end], bias.requires_grad)
            self.add_module(f"part_{number}", part)
        native.weight = native.bias = None  # type: ignore[assignment]
        self.sizes = tuple(sizes)
        self.native: Any
        object.__setattr__(self, "native", native)
        self.train(native.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs (... x out) for inputs (... x in)."""
        return torch.cat([part(x) for part in self.children()], dim=-1)


class SplitLinears(Transform):
    """Linear layers, by path, that are several: the outputs of each part."""

    kind: ClassVar[str] = "split"
    order: ClassVar[int] = 20
    key: ClassVar[str] = "split"

    def apply(self, model: nn.Module, entry: Mapping[str, Any]) -> None:
        """See `Transform.apply`."""
        split_linears(model, entry["split"])

    def undo(self, model: nn.Module) -> None:
        """See `Transform.undo`."""
        join_linears(model)

    def entry(self, model: nn.Module) -> dict[str, Any] | None:
        """See `Transform.entry`."""
        sizes = {path: list(module.sizes) for path, module in splits_of(model).items()}
        return {"split": sizes} if sizes else None

    def format(self, entry: Mapping[str, Any]) -> int:
        """See `Transform.format`."""
        return 4


def split_linears(model: nn.Module, sizes: Mapping[str, Sequence[int]]) -> None:
    """Replace linear layers, by path, by several each, in place."""
    for path, some in sizes.items():
        model.set_submodule(path, SplitLinear(model.get_submodule(path), some))


def join_linears(model: nn.Module) -> None:
    """Undo `split_linears`, in place, wherever every part is still a dense linear layer."""
    for path, split in splits_of(model).items():
        parts = list(split.children())
        if all(isinstance(part, nn.Linear) for part in parts):
            native = split.native
            weight = torch.cat([part.get_parameter("weight").data for part in parts])
            weight = weight if isinstance(native, nn.Linear) else weight.t().contiguous()
            native.weight = nn.Parameter(weight, parts[0].get_parameter("weight").requires_grad)
            if parts[0].bias is not None:
                biases = [part.get_parameter("bias") for part in parts]
                native.bias = nn.Parameter(torch.cat([bias.data for bias in biases]), biases[0].requires_grad)
            model.set_submodule(path, native)


def splits_of(model: nn.Module) -> dict[str, SplitLinear]:
    """Return the layers that `split_linears` has put there, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, SplitLinear)}
