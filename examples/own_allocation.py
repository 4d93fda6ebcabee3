"""Your own allocation, registered from outside the package, on the demo model.

    python examples/own_allocation.py

The first and the last blocks keep more, all others keep the same: those blocks are often said to matter most.
"""

import sys
from typing import Annotated

import numpy as np
from pydantic import Field

import slimrank
from slimrank.budget.problem import Allocation, Problem
from slimrank.budget.proportional import ranks_from_fractions

Ends = Annotated[int, Field(ge=0, description="Blocks at either end that keep more.")]
Extra = Annotated[float, Field(ge=0, le=1, description="Additional fraction of their parameters.")]


@slimrank.allocator(
    id="ends",
    title="More for the first and the last blocks, the same for all others",
    paper="an example",
)
def ends(problem: Problem, *, blocks: Ends = 2, extra: Extra = 0.2) -> Allocation:
    """Give keep + extra to the blocks at both ends and keep to the others, shifted to meet the budget."""
    depth = np.array([item.block for item in problem.items])
    outer = (depth < blocks) | (depth > depth.max() - blocks)
    return Allocation(ranks_from_fractions(problem, problem.keep_ratio + extra * outer))


if __name__ == "__main__":
    model = sys.argv[1] if len(sys.argv) > 1 else "demo"
    for allocation, options in (("uniform", {}), ("ends", {}), ("ends", {"extra": 0.1})):
        made = slimrank.compress(
            model, keep_ratio=0.8, method="svd_llm", allocation=allocation, allocation_options=options,
            samples=16, windows=4, run_dir="own-allocation.run",  # which stores the statistics for the next one
        )  # fmt: skip
        print(allocation, options, round(made.report["after"]["perplexity"]["perplexity"], 2))
