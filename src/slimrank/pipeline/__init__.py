"""The walk of a model through all stages. The only place that joins them."""

from slimrank.pipeline.job import CompressionResult
from slimrank.pipeline.walk import compress, find_plan

__all__ = ["CompressionResult", "compress", "find_plan"]
