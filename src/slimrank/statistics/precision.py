"""Hooks of layers that compute in full precision, where the layers themselves run in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def exact(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook of a layer with autocast off: its products have the dtype of its tensors."""

    def uncast(module: Any, args: tuple[Any, ...], *output: Tensor) -> Any:
        with torch.autocast(args[0].device.type, enabled=False):
            return hook(module, args, *output)

    return uncast


def widened(x: Tensor) -> Tensor:
    """Return a tensor in float32, or in its own dtype if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
