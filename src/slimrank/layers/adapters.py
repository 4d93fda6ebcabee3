"""LoRA adapters on some linear layers of a model, for a while: at the end they are merged into the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Annotated, Any

import torch
from pydantic import Field

from slimrank.errors import MissingExtraError

Rank = Annotated[int, Field(ge=1, description="Rank of the adapters.")]
Alpha = Annotated[float, Field(gt=0, allow_inf_nan=False, description="Adapters are multiplied by alpha / rank.")]
Dropout = Annotated[float, Field(ge=0, lt=1, description="Part of the inputs of adapters that is dropped.")]


@contextmanager
def adapted(model: Any, paths: Sequence[str], rank: int, alpha: float, dropout: float) -> Iterator[None]:
    """Put adapters on these layers inside the context, the only parameters that are trained; merge them at its end.

    Raises:
        MissingExtraError: peft is not installed.
    """
    if find_spec("peft") is None:
        raise MissingExtraError("peft", "recover", "recovery by adapters")
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # a number
        lora_dropout=dropout,
        target_modules=list(paths),
    )
    model.requires_grad_(False)
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    try:
        yield
    finally:
        _merge(model, paths)


@torch.no_grad()
def _merge(model: Any, paths: Sequence[str]) -> None:
    for path in paths:
        layer: Any = model.get_submodule(path)
        layer.merge()
        model.set_submodule(path, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
