"""The layer that stands in for a compressed weight. Copied into saved models; imports nothing but torch.

A kind of layer is one subclass of `CompressedLinear`, in a file of its own that imports nothing but torch and files of
this folder which do the same. It is registered by defining it, also from outside the package.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

KINDS: dict[str, type[CompressedLinear]] = {}
HELD = (
    "the parts of the layer are quantised by another library, so their numbers are not at hand: load the model without "
    "quantization_config, from the folder that slimrank wrote"
)
NEW_FORMAT = 5  # of saved models: the first one that says the kind of each layer


class CompressedLinear(nn.Module):
    """y = W x + bias, where W (out x in) has a rank and is not stored as it is.

    A subclass sets `kind`, and has `factors`, `set_b` and `forward`. Its constructor takes `bias` (whether it has one),
    `device` and `dtype`, too.

    Attributes:
        kind: the name under which it is saved, and found again.
        format: the least format of saved models that knows the kind.
        in_features: n.
        out_features: m.
        rank: of W.
        bias: m long, or None.
        least_nearest: fewest bits at which rounding its parts to the nearest does not destroy it.
    """

    kind: ClassVar[str]
    format: ClassVar[int] = NEW_FORMAT
    least_nearest: ClassVar[int] = 2
    bias: Tensor | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in vars(cls):
            KINDS[cls.kind] = cls

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank

    # what it computes ---------------------------------------------------------------------------------------

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (rank x in) and B (out x rank), float64 and detached, with W = B A."""
        raise NotImplementedError

    def latent(self, x: Tensor) -> Tensor | None:
        """Return the rank numbers (..., rank) that the output for x (..., in) depends on; None if there are none."""
        return None

    def from_latent(self, z: Tensor) -> Tensor:
        """Return the outputs (..., out) for inputs x, with z (..., rank) being `latent(x)`; kinds without have none."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The dense weight W (out x in), made anew at each access: for code that looks at weights.

        It has no values, on the meta device, where another library holds its parts: see `held_by_others`. Some models
        initialise weights while they are read, which then does nothing.
        """
        if held_by_others(self):
            return torch.empty(self.out_features, self.in_features, device="meta")
        return self.product()

    def product(self) -> Tensor:
        """Return the dense weight W (out x in), where the parts are ordinary numbers."""
        a, b = self.factors()
        return (b @ a).to(next(self.parameters()).dtype)

    def to_dense(self) -> nn.Linear:
        """Return an ordinary `nn.Linear` that computes the same function.

        Raises:
            ValueError: another library holds its parts; see `held_by_others`.
        """
        if held_by_others(self):
            raise ValueError(HELD)
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.weight.detach().clone())
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone())
        return dense

    # changing it --------------------------------------------------------------------------------------------

    def set_b(self, B: Tensor) -> None:
        """Make W = B A, A being that of `factors`, as far as the kind allows; dtypes stay.

        Args:
            B: out x rank.
        """
        raise NotImplementedError

    def set_bias(self, bias: Tensor | None) -> None:
        """Hold this bias (out), or none."""
        self.bias = None if bias is None else nn.Parameter(bias)

    # saving it ----------------------------------------------------------------------------------------------

    def entry(self) -> dict[str, Any]:
        """Return what config.json says of the layer: all that `from_entry` needs."""
        shape = {"rank": self.rank, "in": self.in_features, "out": self.out_features}
        return {"kind": self.kind, **shape, "bias": self.bias is not None}

    @classmethod
    def from_entry(
        cls, entry: Mapping[str, Any], device: torch.device | str | None, dtype: torch.dtype | None
    ) -> CompressedLinear:
        """Return a layer without values, to be loaded into."""
        make: Any = cls  # each kind's constructor takes these
        layer: CompressedLinear = make(
            entry["in"], entry["out"], entry["rank"], entry["bias"], device=device, dtype=dtype
        )
        return layer

    def tied_names(self) -> tuple[str, ...]:
        """Return the names of the parameters that layers which are tied have in common: all but the bias.

        transformers ties no buffers, so each layer has its own.
        """
        return tuple(name for name, _ in self.named_parameters() if name.rpartition(".")[2] != "bias")

    def shared_names(self) -> tuple[str, ...]:
        """Return the names of the tensors that layers with a common factor A share; none where there is no A."""
        return ()

    def extra_repr(self) -> str:
        """Return shape and rank, as `print(model)` shows them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def layer_class(kind: str) -> type[CompressedLinear]:
    """Return the class of a kind of layers.

    Raises:
        ValueError: there is none.
    """
    found = look_up(KINDS, kind)
    if found is None:
        raise ValueError(
            f"layers of the kind '{kind}' are not known: import the package that defines them, or upgrade slimrank"
        )
    return found


def look_up(registry: Mapping[str, T], name: str) -> T | None:
    """Return an entry of a registry of this folder, whose files are imported if need be; None if there is none."""
    if name not in registry:
        import_neighbours()
    return registry.get(name)


def import_neighbours() -> None:
    """Import every file of this folder, so that all of them have registered what they define."""
    folder: Any = sys.modules[str(__package__)]
    for module in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"{__package__}.{module.name}")


def compressed_layers(model: nn.Module) -> dict[str, CompressedLinear]:
    """Return the layers of a model that stand in for a compressed weight, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, CompressedLinear)}


def held_by_others(layer: nn.Module) -> bool:
    """Tell whether a library that quantises holds parts of a layer in a form of its own.

    Such parts compute what they should, but their tensors are not to be multiplied: they are packed, or of a class of
    their own.
    """
    return not all(is_ordinary(p) for p in layer.parameters())


def is_ordinary(tensor: Tensor) -> bool:
    """Tell whether a tensor holds floating-point numbers, in a class of torch itself."""
    return tensor.is_floating_point() and type(tensor).__module__.partition(".")[0] == "torch"


def is_plain(part: nn.Module) -> bool:
    """Tell whether a part only multiplies by its weight: no other library has changed or hooked it."""
    if type(part) is not nn.Linear or type(part.weight) is not nn.Parameter:
        return False
    return not part._forward_hooks and not part._forward_pre_hooks and "forward" not in vars(part)


def numbers(tensor: Tensor) -> Tensor:
    """Return the numbers of a part of a layer, float64 and detached.

    Raises:
        ValueError: another library holds them; see `held_by_others`.
    """
    if not is_ordinary(tensor):
        raise ValueError(HELD)
    return tensor.detach().double()


def load_tensors(layer: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Let a layer hold tensors of this state, in their own memory; what is not in it, e.g. a bias, stays.

    Nothing is written in place: other layers may hold the tensors that were there.
    """
    held = layer.state_dict(keep_vars=True)
    for name, tensor in state.items():
        held[name].data = tensor.to(held[name], copy=True)


def share_tensors(layer: nn.Module, other: nn.Module, names: Iterable[str]) -> None:
    """Let a layer hold the very tensors that another one holds under these names."""
    for name in names:
        path, _, last = name.rpartition(".")
        setattr(layer.get_submodule(path), last, getattr(other.get_submodule(path), last))
