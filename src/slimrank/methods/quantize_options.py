"""Options of rounding weights to integers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from slimrank.methods.refiner import RefineOptions


class QuantizeOptions(BaseModel):
    """How weights are rounded, and towards what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rounding: Annotated[
        Literal["gptq", "nearest"],
        Field(
            description="gptq: with regard to the inputs, the free part of a layer making up for the rounding of the "
            "other; nearest: every number by itself, without text."
        ),
    ] = "gptq"
    anchor: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="1: outputs of the model before rounding are the target; 0: those of the layer's own weight on "
            "the inputs in the rounded model; between: a mixture.",
        ),
    ] = 1.0
    ridge: Annotated[
        float,
        Field(ge=0, allow_inf_nan=False, description="Pull towards the weight, in units of the input energy."),
    ] = 0.1

    largest: Annotated[
        float,
        Field(
            ge=0,
            allow_inf_nan=False,
            description="Tokens whose inputs are more than so many times as large as the median count as if they were "
            "not larger than that. A few tokens of a window may be hundreds of times as large as all others. "
            "0: each counts by its size.",
        ),
    ] = 4.0

    def following(self) -> RefineOptions:
        """Return these options as those of a pass over both models."""
        return RefineOptions(anchor=self.anchor, ridge=self.ridge, held_out=0, residual=False)
