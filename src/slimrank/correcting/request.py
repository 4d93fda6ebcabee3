"""What a correction is asked to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from slimrank.options import requested


class Correction(BaseModel):
    """How large the correction of a quantised model is, how it is found, and what it is measured on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: Annotated[int | None, Field(ge=1, description="Mean rank: the size that it would have in every layer.")] = (
        None
    )
    max_bytes: Annotated[int | None, Field(gt=0, description="Largest size of the adapter's numbers, in bytes.")] = None
    method: Annotated[str, Field(description="Decomposition method of the differences: see 'slimrank methods'.")] = (
        "kfac_svd"
    )
    allocation: Annotated[str, Field(description="How ranks are spread over layers: see 'slimrank methods'.")] = (
        "spectrum"
    )
    sequential: Annotated[
        bool, Field(description="Fit each layer again on its inputs in the model that is corrected so far.")
    ] = True
    calibration: Annotated[str, Field(description="Text to calibrate on: as for compress.")] = "demo"
    samples: Annotated[int, Field(ge=1, description="Windows of it.")] = 64
    seq_len: Annotated[int | None, Field(ge=2, description="Tokens a window; by default 512.")] = None
    evaluation: Annotated[tuple[str, ...], Field(description="Texts to measure on, before and after; none: ().")] = (
        "demo",
    )
    windows: Annotated[int, Field(ge=2, description="First windows of each of these.")] = 16
    seed: Annotated[int, Field(description="Seed of the calibration windows.")] = 0
    adapter_dtype: Annotated[
        Literal["float16", "float32"], Field(description="What the adapter's numbers are stored in.")
    ] = "float16"
    gguf: Annotated[bool, Field(description="Write adapter.gguf for llama.cpp, too, for a GGUF file.")] = False
    device: Annotated[str, Field(description="Where to compute: auto, cpu, cuda, mps, ...")] = "auto"

    @model_validator(mode="after")
    def _one_size(self) -> Correction:
        if (self.rank is None) == (self.max_bytes is None):
            raise ValueError("give one of rank and max_bytes")
        return self

    @property
    def dtype(self) -> torch.dtype:
        """What the adapter's numbers are stored in."""
        return torch.float16 if self.adapter_dtype == "float16" else torch.float32

    @classmethod
    def make(cls, given: Mapping[str, Any]) -> Correction:
        """Make a request.

        Raises:
            RecipeError: an unknown option, or a value out of range.
        """
        return requested(cls, given, "a correction", "--rank 16, or --max-bytes 5000000")
