"""Tensors of a layout under the names that slimrank has for them, file by file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from slimrank.converting.layout import Layout
from slimrank.converting.source import opened
from slimrank.errors import ModelError
from slimrank.models.files import INDEX, SINGLE
from slimrank.store import write_text

_DAMAGED = "the files belong to another configuration; download the model again"


class Renaming:
    """What becomes of the tensors of a layout.

    Args:
        layout: theirs.
        ranks: path of each compressed layer -> its rank.
    """

    def __init__(self, layout: Layout, ranks: Mapping[str, int]) -> None:
        self.prefix = layout.prefix
        names, self.ranks = layout.names, ranks
        self.known: dict[str, str | None] = {}
        for path in ranks:
            ours = {names.a: "A.weight", names.b: "B.weight", names.bias: "B.bias"}
            self.known |= {f"{path}.{theirs}": f"{path}.{part}" for theirs, part in ours.items()}
            self.known |= {f"{path}.{part}": None for part in names.empty}

    def name(self, theirs: str) -> str | None:
        """Return the name of a tensor in a folder of slimrank; None for one that holds nothing."""
        plain = theirs.removeprefix(self.prefix)
        return self.known.get(plain, plain)


def rewrite(files: list[Path], renaming: Renaming, folder: Path) -> dict[str, tuple[int, ...]]:
    """Write all tensors into a folder under our names, one file for each of theirs.

    Returns:
        The shape of each tensor.

    Raises:
        ModelError: a file is damaged.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    index: dict[str, str] = {}
    size = 0
    for i, path in enumerate(files):
        name = SINGLE if len(files) == 1 else f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        with opened(path) as given:
            found = _renamed(given, renaming)
            save_file(found, folder / name, {"format": "pt"})
        shapes |= {key: tuple(tensor.shape) for key, tensor in found.items()}
        index |= dict.fromkeys(found, name)
        size += sum(tensor.nbytes for tensor in found.values())
    if len(files) > 1:
        content: dict[str, Any] = {"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))}
        write_text(folder / INDEX, json.dumps(content, indent=2) + "\n")
    return shapes


def _renamed(given: Mapping[str, Tensor], renaming: Renaming) -> dict[str, Tensor]:
    """Return tensors under our names; those that share memory are stored each."""
    found: dict[str, Tensor] = {}
    places: set[int] = set()
    for theirs in given:
        name = renaming.name(theirs)
        if name is None:
            continue
        tensor = given[theirs]
        if not isinstance(tensor, Tensor):
            raise ModelError(f"'{theirs}' in the weight files is not a tensor.", _DAMAGED)
        tensor = tensor.contiguous()
        found[name] = tensor.clone() if tensor.data_ptr() in places else tensor
        places.add(found[name].data_ptr())
    return found


def layer_entries(shapes: Mapping[str, tuple[int, ...]], ranks: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Return what config.json says of each compressed layer.

    Raises:
        ModelError: factors are missing, or of another shape than the table of ranks says.
    """
    return {path: _entry(shapes, path, rank) for path, rank in ranks.items()}


def _entry(shapes: Mapping[str, tuple[int, ...]], path: str, rank: int) -> dict[str, Any]:
    a, b = (shapes.get(f"{path}.{part}.weight") for part in ("A", "B"))
    if a is None or b is None:
        raise ModelError(f"the weight files hold no factors of '{path}', which has a rank of {rank}.", _DAMAGED)
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
        raise ModelError(f"the factors of '{path}' are {b} and {a}, but its rank is {rank}.", _DAMAGED)
    return {"kind": "pair", "rank": rank, "in": a[1], "out": b[0], "bias": f"{path}.B.bias" in shapes}
