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
from slimrank.checkpoint.register import register_lazily

if TYPE_CHECKING:
    from slimrank.budget.rank_plan import RankPlan as RankPlan
    from slimrank.converting.api import convert as convert
    from slimrank.correcting.api import correct as correct
    from slimrank.errors import SlimrankError as SlimrankError
    from slimrank.evaluate.perplexity import perplexity as perplexity
    from slimrank.exporting.api import export as export
    from slimrank.exporting.onnx.runner import OnnxModel as OnnxModel
    from slimrank.exporting.openvino.runner import OpenVinoModel as OpenVinoModel
    from slimrank.hub.pushing import push as push
    from slimrank.layers.latent_cache import latent_cache as latent_cache
    from slimrank.layers.low_rank import LowRankLinear as LowRankLinear
    from slimrank.layers.pivot import PivotLinear as PivotLinear
    from slimrank.methods.allocator import allocator as allocator
    from slimrank.methods.decomposer import decomposer as decomposer
    from slimrank.methods.refiner import refiner as refiner
    from slimrank.models.latent_default import use_latent_cache as use_latent_cache
    from slimrank.models.load import load as load
    from slimrank.models.packing import pack as pack
    from slimrank.models.packing import unpack as unpack
    from slimrank.models.targets import find_targets as find_targets
    from slimrank.narrowing.api import narrow as narrow
    from slimrank.pipeline import CompressionResult as CompressionResult
    from slimrank.pipeline import compress as compress
    from slimrank.pipeline import find_plan as find_plan
    from slimrank.pipeline.preview import preview as preview
    from slimrank.recipe import Recipe as Recipe
    from slimrank.recovery.api import recover as recover

_HOME = {
    "CompressionResult": "pipeline",
    "LowRankLinear": "layers.low_rank",
    "OnnxModel": "exporting.onnx.runner",
    "OpenVinoModel": "exporting.openvino.runner",
    "PivotLinear": "layers.pivot",
    "RankPlan": "budget.rank_plan",
    "Recipe": "recipe",
    "SlimrankError": "errors",
    "allocator": "methods.allocator",
    "compress": "pipeline",
    "decomposer": "methods.decomposer",
    "convert": "converting.api",
    "correct": "correcting.api",
    "export": "exporting.api",
    "find_plan": "pipeline",
    "find_targets": "models.targets",
    "latent_cache": "layers.latent_cache",
    "load": "models.load",
    "narrow": "narrowing.api",
    "pack": "models.packing",
    "perplexity": "evaluate.perplexity",
    "preview": "pipeline.preview",
    "push": "hub.pushing",
    "recover": "recovery.api",
    "refiner": "methods.refiner",
    "unpack": "models.packing",
    "use_latent_cache": "models.latent_default",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'slimrank' has no attribute '{name}'")
    return getattr(importlib.import_module(f"slimrank.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


register_lazily()
