"""Linear layers whose weights are integers times scales. Copied into saved models that need it.

In memory the weight is an ordinary one, so that the layer computes as any other. Its state, which is what is saved, is
packed as the library compressed-tensors packs it ("pack-quantized"): transformers and engines read that format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slimrank.layers.transforms import Transform
from slimrank.linalg.scheme import WORD_BITS, Scheme

PACKED, SCALE, ZERO, SHAPE = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"


class QuantizedLinear(nn.Linear):
    """y = W x + bias, where W (out x in) lies on a grid of integers.

    Attributes:
        scheme: of the integers.
        weight: W, in the dtype of the scales.
        weight_scale: out x groups.
        weight_zero_point: out x groups, int8; None for a symmetric scheme.
    """

    weight_scale: Tensor
    weight_zero_point: Tensor | None

    def __init__(self, in_features: int, out_features: int, scheme: Scheme, bias: bool = False, **place: Any) -> None:
        if not scheme.divides(in_features):
            raise ValueError(f"groups of {scheme.group} do not divide {in_features} columns")
        super().__init__(in_features, out_features, bias, **place)
        self.scheme = scheme
        groups = (out_features, in_features // scheme.columns(in_features))
        zero = None if scheme.symmetric else torch.zeros(groups, dtype=torch.int8, device=place.get("device"))
        self.register_buffer(SCALE, torch.ones(groups, **place), persistent=False)
        self.register_buffer(ZERO, zero, persistent=False)

    @classmethod
    def holding(
        cls, scheme: Scheme, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None = None
    ) -> QuantizedLinear:
        """Return a layer that holds these tensors themselves; the weight must lie on the grid of the others."""
        layer = cls(weight.shape[1], weight.shape[0], scheme, device="meta")
        layer.weight = nn.Parameter(weight)
        layer.weight_scale, layer.weight_zero_point = scale, zero
        layer.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        return layer

    def codes(self) -> Tensor:
        """Return the integers (out x in, int8), which follow exactly from weight, scale and zero point."""
        columns = self.scheme.columns(self.in_features)
        x = self.weight.detach().double().unflatten(1, (-1, columns)) / self.weight_scale.double()[..., None]
        zero = 0 if self.weight_zero_point is None else self.weight_zero_point[..., None]
        return (x + zero).round_().clamp_(*self.scheme.codes).flatten(1).to(torch.int8)

    def packed(self) -> dict[str, Tensor]:
        """Return the tensors that stand for the weight on disk."""
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        found = {PACKED: pack_to_int32(self.codes(), self.scheme.bits), SCALE: self.weight_scale}
        found[SHAPE] = torch.tensor(self.weight.shape)
        if self.weight_zero_point is not None:
            found[ZERO] = pack_to_int32(self.weight_zero_point, self.scheme.bits, packed_dim=0).contiguous()
        return found

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}weight"]
        destination.update({f"{prefix}{name}": tensor for name, tensor in self.packed().items()})

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *others: Any) -> None:
        packed = {name: state.pop(f"{prefix}{name}") for name in (PACKED, SCALE, ZERO, SHAPE) if prefix + name in state}
        if packed:
            state[f"{prefix}weight"] = self._unpack(packed)
        super()._load_from_state_dict(state, prefix, *others)

    def _unpack(self, packed: Mapping[str, Tensor]) -> Tensor:
        """Take scale and zero point from tensors on disk; return the weight."""
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        scale, bits = packed[SCALE].to(self.weight.device), self.scheme.bits
        codes = unpack_from_int32(packed[PACKED], bits, self.weight.shape).to(scale)
        self.weight_scale = scale
        if ZERO in packed:
            by_group = packed[ZERO].t().flatten().view(scale.shape[1], -1)  # a single word in a row has an odd stride
            zero = unpack_from_int32(by_group, bits, scale.t().shape).t().contiguous()
            self.weight_zero_point = zero.to(scale.device)
            codes -= self.weight_zero_point.to(scale).repeat_interleave(self.scheme.columns(self.in_features), 1)
        return codes * scale.repeat_interleave(self.scheme.columns(self.in_features), 1)

    def extra_repr(self) -> str:
        """Return shape and scheme, as `print(model)` shows them."""
        return f"{super().extra_repr()}, {self.scheme}"


class PackedLinear(nn.Module):
    """Room for the tensors of a layer of integers, as they are stored, while a model is read."""

    def __init__(self, like: nn.Linear, scheme: Scheme) -> None:
        super().__init__()
        rows, columns = like.out_features, like.in_features
        groups = columns // scheme.columns(columns)
        shapes = {PACKED: (rows, words(columns, scheme.bits)), SHAPE: (2,)}
        shapes |= {} if scheme.symmetric else {ZERO: (words(rows, scheme.bits), groups)}
        for name, shape in shapes.items():
            empty = torch.zeros(shape, dtype=torch.int64 if name == SHAPE else torch.int32, device=like.weight.device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        scale = torch.ones((rows, groups), dtype=like.weight.dtype, device=like.weight.device)
        self.register_parameter(SCALE, nn.Parameter(scale, requires_grad=False))
        self.bias, self.scheme, self.shape = like.bias, scheme, (columns, rows)

    @property
    def weight(self) -> Tensor:
        """A tensor of the weight's shape without values: some models initialise it before anything is read."""
        return torch.empty(self.shape[::-1], device="meta", dtype=self.weight_scale.dtype)  # type: ignore[arg-type]

    def unpacked(self) -> QuantizedLinear:
        """Return the layer that these tensors stand for."""
        scale: Any = self.weight_scale
        place = {"device": scale.device, "dtype": scale.dtype}
        layer = QuantizedLinear(*self.shape, self.scheme, self.bias is not None, **place)
        layer.load_state_dict(self.state_dict(), assign=True)
        return layer


class QuantizedWeights(Transform):
    """Every linear layer of integers, by path, with its scheme.

    compressed-tensors itself leaves the integers packed until the first forward pass, and its version 0.20 cannot make
    room for packed zero points. So the layers are read here.
    """

    kind: ClassVar[str] = "quantized"
    order: ClassVar[int] = 40

    def apply(self, model: nn.Module, entry: Mapping[str, Any]) -> None:
        """Make room for the packed tensors; see `Transform.apply`."""
        for path, scheme in entry["schemes"].items():
            try:
                like: Any = model.get_submodule(path)
            except AttributeError as error:
                raise ValueError(f"the quantised layer '{path}' is not in {type(model).__name__}") from error
            model.set_submodule(path, PackedLinear(like, Scheme.parse(scheme)))

    def loaded(self, model: nn.Module, entry: Mapping[str, Any]) -> None:
        """Unpack the weights; see `Transform.loaded`."""
        for path in entry["schemes"]:
            packed: Any = model.get_submodule(path)
            model.set_submodule(path, packed.unpacked().train(packed.training))

    def undo(self, model: nn.Module) -> None:
        """Replace every layer of integers by an ordinary one that computes the same."""
        for path, layer in quantized_layers(model).items():
            dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            dense.weight, dense.bias = layer.weight, layer.bias
            model.set_submodule(path, dense.train(layer.training))

    def entry(self, model: nn.Module) -> dict[str, Any] | None:
        """See `Transform.entry`."""
        known = (QuantizedLinear, PackedLinear)
        schemes = {path: str(layer.scheme) for path, layer in model.named_modules() if isinstance(layer, known)}
        return {"schemes": schemes} if schemes else None

    def needed(self, entry: Mapping[str, Any]) -> list[str]:
        """Return the paths of all layers."""
        return [f"{path}." for path in entry["schemes"]]


def words(numbers: int, bits: int) -> int:
    """Return how many words so many integers are packed into."""
    return -(-numbers * bits // WORD_BITS)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Return the layers of a model whose weights are integers, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}
