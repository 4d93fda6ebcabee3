"""Test whether a model that reads images computes text without any, before its weights are read."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from slimrank.errors import ModelError
from slimrank.models.explained import reason_of

_TOKENS = 4
_REFUSALS = (AttributeError, TypeError, ValueError)  # anything else is for want of weights


def reads_images(model_class: Any) -> bool:
    """Tell whether transformers lists a class among those for images and text."""
    return model_class.__name__ in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()


def check_text_alone(model_class: Any, config: Any) -> None:
    """Run a model of this class, without weights, on a few tokens of text.

    Args:
        model_class: one that reads images.
        config: does not change.

    Raises:
        ModelError: it refuses text alone.
    """
    special = [value for key, value in vars(config).items() if key.endswith(("token_id", "token_index"))]
    token = next(i for i in range(len(special) + 1) if i not in special)
    with torch.device("meta"):
        model = model_class._from_config(deepcopy(config), dtype=torch.float32)
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            model.eval().to_empty(device="cpu")(input_ids=torch.full((1, _TOKENS), token), use_cache=False)
    except _REFUSALS as error:
        raise ModelError(
            f"{model_class.__name__} cannot compute text without images: {reason_of(error)}",
            "use another version of transformers, or the language model alone",
        ) from error
    except Exception:  # what a forward pass without weights cannot do
        return
