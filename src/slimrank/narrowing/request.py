"""What `narrow` is asked to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from slimrank.linalg.subset import Selection
from slimrank.options import requested


class Narrowing(BaseModel):
    """How narrow MLPs become, how hidden units are chosen, and what the result is measured on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keep_ratio: Annotated[
        float, Field(gt=0, le=1, description="Fraction of the parameters of all linear layers to keep at most.")
    ]
    multiple: Annotated[int, Field(ge=1, description="New widths are multiples of it.")] = 64
    select: Annotated[
        Selection,
        Field(
            description="How hidden units are chosen. eliminate: take away, each time, the one that the others replace "
            "best. pivoted: the one that is explained least, weighted by its column. leverage: ridge leverage scores."
        ),
    ] = "eliminate"
    refit: Annotated[
        Literal["readers", "all"],
        Field(
            description="Layers that are solved for again on the narrow model's inputs: those that read hidden units, "
            "or all linear layers of the blocks, which takes more text."
        ),
    ] = "readers"
    anchor: Annotated[
        float,
        Field(ge=0, le=1, description="1: outputs of the original model are the target; 0: those of the original "
              "weight on the narrow model's inputs; between: a mixture."),
    ] = 1.0  # fmt: skip
    ridge: Annotated[
        float,
        Field(ge=0, allow_inf_nan=False, description="Pull of the fit towards the original weight, before units are "
              "taken away, in units of the mean energy of inputs."),
    ] = 1e-2  # fmt: skip
    calibration: Annotated[str, Field(description="Text to calibrate on: as for compress.")] = "demo"
    samples: Annotated[int, Field(ge=1, description="Windows of it.")] = 64
    seq_len: Annotated[int | None, Field(ge=2, description="Tokens a window; by default 512.")] = None
    evaluation: Annotated[tuple[str, ...], Field(description="Texts to measure on; none: ().")] = ("demo",)
    windows: Annotated[int, Field(ge=2, description="First windows of each of these.")] = 16
    seed: Annotated[int, Field(description="Seed of the calibration windows.")] = 0
    device: Annotated[str, Field(description="Where to compute: auto, cpu, cuda, mps, ...")] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Field(description="Of the stored weights; auto: as they are."),
    ] = "auto"
    max_shard_size: Annotated[str, Field(description="Size of the largest weight file.")] = "5GB"

    @classmethod
    def make(cls, given: Mapping[str, Any]) -> Narrowing:
        """Make a request.

        Raises:
            RecipeError: an unknown option, or a value out of range.
        """
        return requested(cls, given, "a narrow model", "--keep 0.8")
