"""A decomposition method of one's own, registered from outside the package, on the demo model.

    python examples/own_method.py

It weighs input channels by their energy and ignores how they correlate: the diagonal of svd_llm's metric.
"""

import sys

import slimrank
from slimrank.linalg.lowrank import solve


@slimrank.decomposer(
    id="diagonal",
    title="Channel energies only: the diagonal of the Gram",
    paper="an example",
    needs={"gram"},
)
def diagonal(weight, gram=None):
    """Minimise the change of the output as if channels were uncorrelated."""
    return solve(weight, gram.diagonal().diag())


if __name__ == "__main__":
    model = sys.argv[1] if len(sys.argv) > 1 else "demo"
    for method in ("svd", "diagonal", "svd_llm"):
        result = slimrank.compress(model, keep_ratio=0.9, method=method, samples=16, windows=4)
        print(method, round(result.report["after"]["perplexity"]["perplexity"], 2))
