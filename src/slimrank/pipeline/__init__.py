"""The walk of a model through all stages. The only place that joins them."""

from slimrank.pipeline.job import CompressionResult
from slimrank.pipeline.walk import compress

__all__ = ["CompressionResult", "compress"]
