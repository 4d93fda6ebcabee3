"""Layers that stand in for a compressed weight."""

from slimrank.layers.base import CompressedLinear
from slimrank.layers.low_rank import LowRankLinear
from slimrank.layers.pivot import PivotLinear

__all__ = ["CompressedLinear", "LowRankLinear", "PivotLinear"]
