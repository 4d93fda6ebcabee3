"""Layers that stand in for a compressed weight."""

from slimrank.layers.low_rank import LowRankLinear

__all__ = ["LowRankLinear"]
