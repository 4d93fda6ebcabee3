"""Make large language models smaller and faster by low-rank factorisation.

    import slimrank
    result = slimrank.compress("org/model", keep_ratio=0.8, out="smaller")

Importing slimrank registers its loader with transformers (as soon as that is imported), so that
`AutoModelForCausalLM.from_pretrained("smaller")` works. Nothing heavy is imported until it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from slimrank._version import __version__
from slimrank.export.register import register_lazily

if TYPE_CHECKING:
    from slimrank.allocate.plan import RankPlan as RankPlan
    from slimrank.allocate.registry import allocator as allocator
    from slimrank.decompose.registry import decomposer as decomposer
    from slimrank.dry_run import preview as preview
    from slimrank.errors import SlimrankError as SlimrankError
    from slimrank.evaluate.perplexity import perplexity as perplexity
    from slimrank.layers.low_rank import LowRankLinear as LowRankLinear
    from slimrank.layers.pivot import PivotLinear as PivotLinear
    from slimrank.models.load import load as load
    from slimrank.models.targets import find_targets as find_targets
    from slimrank.pipeline import CompressionResult as CompressionResult
    from slimrank.pipeline import compress as compress
    from slimrank.pipeline import find_plan as find_plan
    from slimrank.recipe import Recipe as Recipe
    from slimrank.refine.registry import refiner as refiner

_HOME = {
    "CompressionResult": "pipeline",
    "LowRankLinear": "layers.low_rank",
    "PivotLinear": "layers.pivot",
    "RankPlan": "allocate.plan",
    "Recipe": "recipe",
    "SlimrankError": "errors",
    "allocator": "allocate.registry",
    "compress": "pipeline",
    "decomposer": "decompose.registry",
    "find_plan": "pipeline",
    "find_targets": "models.targets",
    "load": "models.load",
    "perplexity": "evaluate.perplexity",
    "preview": "dry_run",
    "refiner": "refine.registry",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'slimrank' has no attribute '{name}'")
    return getattr(importlib.import_module(f"slimrank.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


register_lazily()
