"""What a recovery is asked to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from slimrank.options import requested


class Recovery(BaseModel):
    """How a compressed model is trained, on what, and what it is measured on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Annotated[str, Field(description="Recovery method: see 'slimrank methods'.")] = "distill"
    options: Annotated[
        dict[str, Any], Field(description="Options of the method and of training: see 'slimrank methods ID'.")
    ] = {}
    text: Annotated[str, Field(description="Text to train on: as for compress --calibration.")] = "demo"
    chat: Annotated[bool, Field(description="Train on the answers of chats, by the chat template.")] = False
    evaluation: Annotated[tuple[str, ...], Field(description="Texts to measure on, before and after; none: ().")] = (
        "demo",
    )
    windows: Annotated[int, Field(ge=2, description="First windows of each of these.")] = 16
    seq_len: Annotated[int | None, Field(ge=2, description="Tokens per window; by default 512.")] = None
    seed: Annotated[int, Field(description="Seed of the order of the text, and of adapters.")] = 0
    device: Annotated[str, Field(description="Where to compute: auto, cpu, cuda, mps, ...")] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], Field(description="Dtype to load and to store in.")
    ] = "auto"
    report_to: Annotated[tuple[str, ...], Field(description="Trackers that transformers knows: wandb, ...")] = ()
    max_shard_size: Annotated[str, Field(description="Size of the largest weight file.")] = "5GB"

    @classmethod
    def make(cls, given: Mapping[str, Any]) -> Recovery:
        """Make a request.

        Raises:
            RecipeError: an unknown option, or a value out of range.
        """
        return requested(cls, given, "recovery")
