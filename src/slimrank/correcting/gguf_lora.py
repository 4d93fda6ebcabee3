"""Write a correction as a GGUF adapter, which llama.cpp applies over the GGUF file that is corrected."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimrank.correcting.peft_folder import Factors
from slimrank.errors import MissingExtraError, ModelError

ADAPTER = "adapter.gguf"
ELSEWHERE = "leave out --gguf, and load the PEFT adapter with transformers"


def need_gguf() -> Any:
    """Import the package that reads and writes GGUF files.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("gguf", "demo", "writing a GGUF adapter") from error
    return gguf


def write_gguf_lora(factors: Factors, weights: Mapping[str, Tensor], base: Path, path: Path) -> None:
    """Write a GGUF file with the factors of each layer, in their dtype.

    llama.cpp multiplies the product of an adapter by alpha / rank. Alpha is 1, so B is written times its rank.

    Args:
        factors: of each layer.
        weights: of the same layers in transformers, as the base holds them (m x n).
        base: the GGUF file that is corrected.
        path: to write to.

    Raises:
        ModelError: the file has no such weight, or in another order than can be followed.
    """
    gguf = need_gguf()
    reader = gguf.GGUFReader(base)
    architecture = str(reader.fields["general.architecture"].contents())
    names = _names(gguf, architecture, factors)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 1.0)
    for layer, (a, b) in factors.items():
        tensor = stored.get(f"{names[layer]}.weight")
        if tensor is None:
            raise ModelError(f"'{base}' has no tensor '{names[layer]}.weight' for the layer '{layer}'.", ELSEWHERE)
        order = row_order(gguf.dequantize(tensor.data, tensor.tensor_type), weights[layer], layer)
        writer.add_tensor(f"{names[layer]}.weight.lora_a", a.numpy())
        writer.add_tensor(f"{names[layer]}.weight.lora_b", (len(a) * b.float())[order].to(b.dtype).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _names(gguf: Any, architecture: str, factors: Factors) -> dict[str, str]:
    """Return the name of each layer in a GGUF file."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    blocks = 1 + max(int(part) for layer in factors for part in layer.split(".") if part.isdigit())
    known = gguf.get_tensor_name_map(kinds[architecture], blocks)
    found = {layer: known.get_name(layer) for layer in factors}
    missing = next((layer for layer, name in found.items() if name is None), None)
    if missing is not None:
        raise ModelError(f"GGUF has no name for the layer '{missing}' of '{architecture}'.", ELSEWHERE)
    return found


def row_order(stored: np.ndarray, weight: Tensor, layer: str) -> Tensor:
    """Return which row of a weight each row of the stored one is; GGUF files sort those of rotary layers anew.

    Args:
        stored: m x n, in the file.
        weight: m x n, in transformers.
        layer: for errors.

    Raises:
        ModelError: the rows are not the same ones.
    """
    there, here = (np.ascontiguousarray(each, np.float32) for each in (stored, weight.float().numpy()))
    if there.shape == here.shape and np.array_equal(there, here):
        return torch.arange(len(here))
    places: dict[bytes, list[int]] = {}
    for number in reversed(range(len(here))):
        places.setdefault(here[number].tobytes(), []).append(number)
    try:
        return torch.tensor([places[row.tobytes()].pop() for row in there])
    except (KeyError, IndexError) as error:
        raise ModelError(
            f"the rows of '{layer}' in the GGUF file are not those that transformers loads.", ELSEWHERE
        ) from error
