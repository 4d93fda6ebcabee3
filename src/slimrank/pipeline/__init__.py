"""The stages of a compression, and what runs them. The only package that joins the others."""

from slimrank.pipeline.compression import CompressionResult, compress, find_plan

__all__ = ["CompressionResult", "compress", "find_plan"]
