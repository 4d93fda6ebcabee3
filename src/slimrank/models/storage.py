"""The size of a model in its files: every parameter and saved buffer once, in its own dtype."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.models.files import StoredTensor

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def torch_dtype(name: str) -> Any:
    """Return the dtype of a name; "auto" as it is."""
    return name if name == "auto" else getattr(torch, name)


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """List what saving writes, by name: parameters and persistent buffers, tied ones once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def saved_bytes(model: nn.Module) -> int:
    """Count the bytes of all tensors that saving writes, headers left out."""
    return sum(t.numel() * t.element_size() for t in saved_tensors(model).values())


def stored_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype in which most of the parameters are stored."""
    counts: Counter[torch.dtype] = Counter()
    for p in model.parameters():
        counts[p.dtype] += p.numel()
    return counts.most_common(1)[0][0]


def written_dtype(tensors: Iterable[StoredTensor]) -> torch.dtype | None:
    """Return the dtype that transformers takes for "auto" where config.json has none: that of the first weight."""
    return next((_DTYPES[each.dtype] for each in tensors if each.dtype in _DTYPES), None)


def cast_as_loaded(model: Any, dtype: torch.dtype) -> None:
    """Give the parameters of a model on the meta device the dtypes that loading would give them.

    Args:
        model: built in `dtype`; some architectures keep parts of theirs in float32.
        dtype: what the model is loaded in.
    """
    kept = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else getattr(model, "dtype_plan", {})
    if not kept:
        return
    pattern = re.compile("|".join(name.replace("*", ".*") for name in kept))
    for name, p in model.state_dict(keep_vars=True).items():
        if pattern.search(name) and p.is_floating_point():
            p.data = p.data.float()
