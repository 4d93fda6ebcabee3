"""What a saved folder says of its layers, as an engine needs it. Knows no engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.errors import ModelError
from slimrank.layers.base import layer_class
from slimrank.layers.factors import kind_of
from slimrank.layers.quantized import PackedLinear
from slimrank.layers.transforms import saved_transforms
from slimrank.linalg.scheme import Scheme
from slimrank.serving.packing import dequantized

DENSE = "dense"
KINDS = (DENSE, "pair", "pivot", "residual")
TRANSFORMS = ("factors", "split", "quantized", "packed")  # packed layers are stored as others: engines join their own
ELSEWHERE = "serve the folder with transformers, or make its layers dense by their to_dense(): docs/pivot.md"


@dataclass(frozen=True)
class Stored:
    """One layer as the folder stores it.

    Attributes:
        path: in the native model.
        kind: of the layer; "dense" for a weight of its own.
        side: of a pivot layer, else empty.
        share: path of the layer whose factor A it uses; empty if it has its own.
        module: the layer without values and without bias; parts of few bits are `PackedLinear`.
    """

    path: str
    kind: str
    side: str
    share: str
    module: nn.Module

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that the folder holds, by name, without values."""
        found = dict(self.module.state_dict(keep_vars=True))
        if self.share:
            del found["A.weight"]
        return found

    def matrices(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the numbers of every part, by the name of its weight, and the order of a pivot layer.

        Args:
            values: the tensors that were read. Those of few bits must be whole.
        """
        found = {name: value for name, value in values.items() if name.endswith(("weight", "order"))}
        for name, part in self.module.named_modules():
            if isinstance(part, PackedLinear):
                prefix = f"{name}." if name else ""
                own = {key: values[prefix + key] for key, _ in part.named_parameters()}
                found[f"{prefix}weight"] = dequantized(own, part.scheme, part.shape[0])
        return found


@dataclass(frozen=True)
class ServedPlan:
    """All layers that are not plain dense ones.

    Attributes:
        layers: path -> what config.json says of the compressed layer.
        splits: path of a layer that is stored as several -> outputs of each.
        schemes: path of a part of few bits -> its scheme. The part may be a layer.
    """

    layers: Mapping[str, Mapping[str, Any]]
    splits: Mapping[str, list[int]] = field(default_factory=dict)
    schemes: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, about: Mapping[str, Any]) -> ServedPlan:
        """Read what config.json says under `slimrank`.

        Raises:
            ModelError: the folder holds a form that engines cannot take.
        """
        found = {transform.kind: entry for transform, entry in saved_transforms(about)}
        strange = sorted(set(found) - set(TRANSFORMS))
        if strange:
            raise ModelError(f"this engine cannot take the form '{strange[0]}' of slimrank.", ELSEWHERE)
        layers = found.get("factors", {}).get("layers", {})
        for path, entry in layers.items():
            if kind_of(entry) not in KINDS:
                raise ModelError(f"this engine cannot take the form '{kind_of(entry)}' of '{path}'.", ELSEWHERE)
            if "tie" in entry:
                raise ModelError(f"this engine cannot take tied layers: '{path}' and '{entry['tie']}'.", ELSEWHERE)
        splits, schemes = found.get("split", {}).get("split", {}), found.get("quantized", {}).get("schemes", {})
        return cls(layers, splits, schemes)

    @property
    def paths(self) -> set[str]:
        """The paths of all layers that an engine must treat."""
        of_parts = {path for path in self.schemes if path.rpartition(".")[0] in self.layers}
        parts = {f"{path}.part_{i}" for path, sizes in self.splits.items() for i in range(len(sizes))}
        return set(self.layers) | (set(self.schemes) - of_parts) | parts

    @property
    def lenders(self) -> set[str]:
        """The paths of layers whose factor A others use."""
        return {entry["share"] for entry in self.layers.values() if "share" in entry}

    @property
    def borrowers(self) -> set[str]:
        """The paths of layers that use the factor A of another one."""
        return {path for path, entry in self.layers.items() if "share" in entry}

    def renamed(self, rename: Callable[[dict[str, Any]], dict[str, Any]]) -> ServedPlan:
        """Return the plan with the paths that an engine has.

        Args:
            rename: takes a dictionary by path and returns it with the other paths as keys.
        """

        def path_of(path: str) -> str:
            return next(iter(rename({path: None})), path)

        layers = {
            path: {**entry, "share": path_of(entry["share"])} if "share" in entry else entry
            for path, entry in rename(dict(self.layers)).items()
        }
        return replace(self, layers=layers, splits=rename(dict(self.splits)), schemes=rename(dict(self.schemes)))

    def stored(self, path: str, shape: tuple[int, int], dtype: torch.dtype) -> Stored:
        """Return one layer as it is stored.

        Args:
            path: of the layer.
            shape: outputs and inputs that the engine expects.
            dtype: of its numbers in the engine.

        Raises:
            ModelError: the stored layer has another shape.
        """
        entry = self.layers.get(path)
        found = (entry["out"], entry["in"]) if entry else shape
        if found != shape:
            raise ModelError(
                f"the layer '{path}' is {found[0]} x {found[1]}; the engine expects {shape[0]} x {shape[1]}.", ELSEWHERE
            )
        module: nn.Module
        if entry is None:
            module = nn.Linear(shape[1], shape[0], bias=False, device="meta", dtype=dtype)
            about = (DENSE, "", "")
        else:
            kind = kind_of(entry)
            module = layer_class(kind).from_entry({**entry, "bias": False}, "meta", dtype)
            about = (kind, entry.get("side", ""), entry.get("share", ""))
        return Stored(path, *about, self._packed(path, module))

    def _packed(self, path: str, module: nn.Module) -> nn.Module:
        """Return the layer with room for packed integers where its parts are of few bits."""
        if path in self.schemes:
            like: Any = module
            return PackedLinear(like, Scheme.parse(self.schemes[path]))
        for name, part in list(module.named_children()):
            if f"{path}.{name}" in self.schemes:
                linear: Any = part
                setattr(module, name, PackedLinear(linear, Scheme.parse(self.schemes[f"{path}.{name}"])))
        return module


def paths_of(prefix: str, fused: Mapping[str, list[str]], splits: Mapping[str, list[int]]) -> list[str]:
    """Return the paths in the saved model of what an engine holds as one layer, in order.

    Args:
        prefix: path of the engine's layer.
        fused: name of a fused layer of the engine -> names of the layers that it joins.
        splits: path of a layer that slimrank stores as several -> outputs of each.
    """
    parent, _, name = prefix.rpartition(".")
    start = f"{parent}." if parent else ""
    joined = [f"{start}{one}" for one in fused.get(name, [name])]
    if joined == [prefix] and prefix in splits:
        return [f"{prefix}.part_{i}" for i in range(len(splits[prefix]))]
    return joined
