"""The next inputs of a model: the last token and its cache, under the name that its `forward` uses."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

# Of transformers 5.24 on; before it, of attention and of state-space models.
NAMES = ("cache", "past_key_values", "cache_params")


def next_inputs(model: Any, output: Any, ids: Tensor) -> dict[str, Any]:
    """Return the arguments that continue `output` by the last of the tokens `ids`.

    A model without a cache reads all tokens again.
    """
    values = dict(output.items())
    taken = inspect.signature(model.forward).parameters
    name = next((name for name in NAMES if name in taken), None)
    cache = next((values[name] for name in NAMES if values.get(name) is not None), None)
    if name is None or cache is None:
        return {"input_ids": ids}
    inputs = {"input_ids": ids[:, -1:], name: cache}
    if "cache_position" in taken:  # which transformers 5.0 does not count by itself for a state-space model
        inputs["cache_position"] = torch.arange(ids.shape[1] - 1, ids.shape[1], device=ids.device)
    return inputs
