"""Linear layers that are compressed, as a change of the model. Copied into saved models; imports nothing but torch."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any, ClassVar

from torch import nn

from slimrank.layers.base import CompressedLinear, compressed_layers, layer_class
from slimrank.layers.transforms import Transform

Entries = Mapping[str, Mapping[str, Any]]


class Factors(Transform):
    """Every compressed layer, by path: its kind and shape, and the path of the layer that it shares tensors with."""

    kind: ClassVar[str] = "factors"
    order: ClassVar[int] = 30
    key: ClassVar[str] = "layers"

    def apply(self, model: nn.Module, entry: Mapping[str, Any]) -> None:
        """Replace each layer by one without values; see `Transform.apply`."""
        layers: Entries = entry["layers"]
        for path, about in layers.items():
            parent_path, _, name = path.rpartition(".")
            try:
                parent = model.get_submodule(parent_path)
                weight = parent.get_submodule(name).get_parameter("weight")
            except AttributeError as error:
                raise ValueError(f"the compressed layer '{path}' is not in {type(model).__name__}") from error
            kind = layer_class(kind_of(about))
            setattr(parent, name, kind.from_entry(about, device=weight.device, dtype=weight.dtype))
        declare_ties(model, layers)

    def undo(self, model: nn.Module) -> None:
        """Replace every compressed layer by a dense one that computes the same."""
        for path, layer in compressed_layers(model).items():
            dense = layer.to_dense()
            dense.requires_grad_(any(p.requires_grad for p in layer.parameters()))
            model.set_submodule(path, dense.train(layer.training))
            _forget_ties(model, path)

    def entry(self, model: nn.Module) -> dict[str, Any] | None:
        """See `Transform.entry`."""
        layers: dict[str, dict[str, Any]] = {}
        first: dict[Any, str] = {}
        for path, layer in compressed_layers(model).items():
            layers[path] = layer.entry()
            tie = first.setdefault(_held(layer, layer.tied_names()), path)
            share = first.setdefault(_held(layer, layer.shared_names()), path) if layer.shared_names() else path
            if tie != path:
                layers[path]["tie"] = tie
            elif share != path:
                layers[path]["share"] = share
        return {"layers": layers} if layers else None

    def format(self, entry: Mapping[str, Any]) -> int:
        """Return the format that knows all kinds of its layers."""
        return max(layer_class(kind_of(about)).format for about in entry["layers"].values())

    def needed(self, entry: Mapping[str, Any]) -> list[str]:
        """Return the paths of all layers."""
        return [f"{path}." for path in entry["layers"]]

    def modules(self, entry: Mapping[str, Any]) -> set[str]:
        """Return this module, and those of all kinds of its layers."""
        kinds = {kind_of(about) for about in entry["layers"].values()}
        return super().modules(entry) | {layer_class(kind).__module__ for kind in kinds}


def kind_of(about: Mapping[str, Any]) -> str:
    """Return the kind of a layer in config.json, which older versions do not write."""
    return str(about.get("kind") or ("pivot" if "side" in about else "pair"))


def declare_ties(model: Any, layers: Entries) -> None:
    """Tell transformers which factors are one tensor, so that it saves them once and ties them after loading."""
    ties: dict[str, str] = {}
    for path, about in layers.items():
        layer: CompressedLinear = model.get_submodule(path)
        if "tie" in about:
            ties |= {f"{path}.{name}": f"{about['tie']}.{name}" for name in layer.tied_names()}
        elif "share" in about:
            ties |= {f"{path}.{name}": f"{about['share']}.{name}" for name in layer.shared_names()}
    if ties:
        declared = {
            k: v for k, v in dict(model._tied_weights_keys or {}).items() if k.removesuffix(".weight") not in layers
        }
        model._tied_weights_keys = {**declared, **ties}
        model.all_tied_weights_keys = {**declared, **ties} if model.config.tie_word_embeddings else ties


def _forget_ties(model: Any, path: str) -> None:
    for name in ("_tied_weights_keys", "all_tied_weights_keys"):
        known = getattr(model, name, None)
        if isinstance(known, dict):
            setattr(model, name, {k: v for k, v in known.items() if not k.startswith(f"{path}.")})


def _held(layer: nn.Module, names: tuple[str, ...]) -> tuple[int, ...]:
    """Identify the very tensors that a layer holds under these names."""
    return tuple(id(attrgetter(name)(layer)) for name in names)
