"""The statistics that a method may ask for, the pass that each takes, and the settings of gathering them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Need = Literal["column", "gram", "channels", "row", "weight_squares", "gradients", "slope", "projectors", "rank"]
Pass = Literal["none", "forward", "backward"]


@dataclass(frozen=True)
class NeedInfo:
    """One kind of statistics, for people: what it is, which pass it takes, which settings steer it."""

    title: str
    takes: Pass
    settings: tuple[str, ...] = ()


NEEDS: dict[Need, NeedInfo] = {
    "column": NeedInfo("gram of the inputs, or of the outputs where that is smaller", "forward"),
    "gram": NeedInfo("gram of the inputs", "forward"),
    "channels": NeedInfo("mean, largest and squared magnitude of each input channel", "forward"),
    "row": NeedInfo(
        "gram of the output gradients, or of their pull-back where that is smaller", "backward", ("trim", "clip")
    ),
    "weight_squares": NeedInfo("squared weight gradients, per input channel", "backward"),
    "gradients": NeedInfo("weight gradients of single samples", "backward", ("accumulate",)),
    "slope": NeedInfo("gradient of the loss by the weight", "backward"),
    "projectors": NeedInfo("projectors on each batch's leading outputs, at the planned rank", "forward"),
    "rank": NeedInfo("the planned rank", "none"),
}


def _ordered(clip: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= clip[0] <= 1 <= clip[1]:
        raise ValueError("clip is [low, high] with 0 <= low <= 1 <= high")
    return clip


class GatherOptions(BaseModel):
    """What is gathered, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    needs: frozenset[Need] = frozenset()
    trim: Annotated[
        float, Field(ge=0, lt=0.5, description="Part of a window's tokens left out at either end, in gradients.")
    ] = 0.125
    clip: Annotated[
        Annotated[tuple[float, float], AfterValidator(_ordered)] | None,
        Field(description="Norms of token gradients are clipped to these multiples of their window's mean."),
    ] = (0.1, 10.0)
    accumulate: Annotated[int, Field(ge=1, description="Windows summed into one sample gradient.")] = 4

    @property
    def backward(self) -> bool:
        """Tell whether gradients are needed."""
        return any(NEEDS[need].takes == "backward" for need in self.needs)

    @property
    def calibrates(self) -> bool:
        """Tell whether calibration text is needed at all."""
        return any(NEEDS[need].takes != "none" for need in self.needs)
