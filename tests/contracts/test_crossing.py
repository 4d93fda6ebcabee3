"""Every method with every layer form and every refiner: it works, or it is refused before any work."""

import math

import pytest
import torch

from helpers import tiny_model
from method_runs import METHODS, compress, logits
from slimrank.errors import RecipeError
from slimrank.layers.base import compressed_layers
from slimrank.methods.decomposer import DECOMPOSERS
from slimrank.methods.refiner import REFINERS

CASES = [
    *((method, {}) for method in METHODS),
    ("drone", {"min_norm": True}),
    ("coala", {"mu": 0.1}),
    ("asvd", {"scale": "max"}),
]
SETTINGS = {"held_out": 0, "residual": True, "anchor": 0.5}


@pytest.mark.parametrize("method, options", CASES, ids=lambda v: v if isinstance(v, str) else ",".join(v) or "plain")
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_every_method_form_and_refiner(model, method, options, tmp_path):
    """One run directory, so that every method is calibrated once."""
    chosen = {"method": method, "method_options": options, "run_dir": tmp_path / "run"}
    shares = DECOMPOSERS.get(method).groups is not None
    for refiner, form in ((r, f) for r in REFINERS.all() for f in ("pair", "pivot")):
        recipe = {**chosen, "form": form, "refine": refiner, "refine_options": SETTINGS}
        if shares and (REFINERS.get(refiner).changes_a or form == "pivot"):
            with pytest.raises(RecipeError):
                compress(tiny_model(model), **recipe)
            continue
        result = compress(tiny_model(model), **recipe)
        rows = [row for row in result.report["targets"] if row["rank"] != "dense"]
        assert rows
        assert all(math.isfinite(row["refined"]["after"]) for row in rows)
        assert len(compressed_layers(result.model)) == len(rows)
        assert result.plan.keep_ratio <= 0.6
        assert bool(torch.isfinite(logits(result.model)).all())
