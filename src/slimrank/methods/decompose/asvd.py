"""ASVD: activation-aware scaling of input channels."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from slimrank.linalg.forms import Metric
from slimrank.linalg.lowrank import Spectrum, solve
from slimrank.methods.decomposer import decomposer
from slimrank.statistics.layer_statistics import LayerStatistics

Alpha = Annotated[float, Field(ge=0, le=1, description="Power of the scale; 0 is the plain SVD.")]
Scale = Annotated[Literal["mean", "max"], Field(description="Mean or largest magnitude of each input channel.")]


@decomposer(
    id="asvd",
    title="ASVD: input channels weighed by their magnitude",
    paper="Yuan et al., ASVD, arXiv 2312.05821",
    needs={"channels"},
)
def asvd(weight: Tensor, statistics: LayerStatistics, *, alpha: Alpha = 0.5, scale: Scale = "mean") -> Spectrum:
    """Minimise || (W - W') S ||_F, S = diag(magnitude of each input channel)^alpha.

    A proxy: it is not the error of the output, which also depends on how channels correlate.
    """
    channels = statistics.channels
    assert channels is not None
    magnitude = channels.largest if scale == "max" else channels.absolute / max(1, channels.count)
    return solve(weight, Metric.of(column=magnitude.pow(2 * alpha)))
