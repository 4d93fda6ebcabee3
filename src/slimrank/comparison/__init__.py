"""Several recipes on one model, measured on the same text: what `slimrank compare` runs."""

from slimrank.comparison.cells import Cell, from_files, grid, in_few_bits
from slimrank.comparison.running import compare

__all__ = ["Cell", "compare", "from_files", "grid", "in_few_bits"]
