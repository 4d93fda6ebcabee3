"""Your own decomposition method, registered from outside the package, on the demo model.

    python examples/own_method.py

It weighs input channels by a power of their energy and ignores how they correlate. Exponent 1 is the diagonal of
svd_llm's metric, 0 the plain SVD; between them, channels with massive activations count for less.
"""

import sys
from typing import Annotated

from pydantic import Field

import slimrank
from slimrank.linalg.forms import Metric
from slimrank.linalg.lowrank import solve

Exponent = Annotated[float, Field(ge=0, le=1, description="Power of the energy; 0 is the plain SVD.")]


@slimrank.decomposer(
    id="diagonal",
    title="Channel energies only: the diagonal of the gram, or a power of it",
    paper="an example",
    needs={"channels"},
)
def diagonal(weight, statistics, *, exponent: Exponent = 1.0):
    """Minimise || (W - W') D ||_F, D^2 = diag(energy of each input channel)^exponent."""
    return solve(weight, Metric.of(column=statistics.channels.squares.pow(exponent)))


if __name__ == "__main__":
    model = sys.argv[1] if len(sys.argv) > 1 else "demo"
    for method, options in (("svd", {}), ("diagonal", {"exponent": 0.5}), ("svd_llm", {})):
        made = slimrank.compress(model, keep_ratio=0.9, method=method, method_options=options, samples=16, windows=4)
        print(method, round(made.report["after"]["perplexity"]["perplexity"], 2))
