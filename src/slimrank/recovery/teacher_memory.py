"""The memory of the original's blocks, once its predictions are stored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from slimrank.models.page_out import page_out
from slimrank.models.structure import find_blocks


@contextmanager
def without_blocks(model: Any, again: bool) -> Iterator[None]:
    """Release the weights of a model's blocks inside the context; its output head still computes.

    Args:
        model: whose blocks are not used inside.
        again: whether it is used as a whole afterwards. Then weights on an accelerator are moved to the host's
            memory, and pages that are mapped from a file are offered to the kernel. Else all are gone for good.
    """
    weights = _inside(model)
    places = [p.device for p in weights]
    page_out(model)
    for p in weights:
        p.data = p.data.cpu() if again else p.data.new_empty(0)
    try:
        yield
    finally:
        for p, device in zip(weights, places, strict=True):
            p.data = p.data.to(device)


def _inside(model: Any) -> list[nn.Parameter]:
    """Return the weights that only blocks have."""
    path, blocks = find_blocks(model)
    every = model.named_parameters(remove_duplicate=False)
    outside = {id(p) for name, p in every if not name.startswith(f"{path}.")}
    return [p for p in blocks.parameters() if id(p) not in outside]
