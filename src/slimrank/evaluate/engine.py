"""The contract of an engine: how a model is loaded into it, and one timed round of generation.

An engine is a subclass of `Engine` in a file of its own; `ENGINES.add` registers it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from slimrank.errors import RecipeError
from slimrank.evaluate.options import Loading
from slimrank.registry import Registry


@dataclass(frozen=True)
class Round:
    """One round: a prompt that is read, and new tokens.

    Attributes:
        prefill: seconds to read the prompt.
        decode: seconds of all decoding steps.
        cache_bytes: of the cache at the end; None where the engine does not tell.
    """

    prefill: float
    decode: float
    cache_bytes: int | None = None


class Running:
    """A model that an engine has loaded.

    Attributes:
        name: how the user names the model.
        dtype: of its computations.
        parameters: how many it has.
        weight_bytes: what its weights take.
        vocabulary: tokens that it tells apart.
        context: longest text; None if it has no bound.
        notes: what was left out or done otherwise.
        kv_bytes: what caches of one text take, by formula: see `models.kv_bytes`; None where that is not known.
    """

    name: str
    dtype: str
    parameters: int
    weight_bytes: int
    vocabulary: int
    context: int | None
    notes: list[str]
    kv_bytes: dict[str, dict[int, int]] | None = None

    def use_cache(self, kind: str) -> None:
        """Keep keys and values in one of `CACHES`; "dynamic" is what the engine does by itself.

        Raises:
            RecipeError: the engine has no other.
        """
        if kind != "dynamic":
            raise RecipeError(
                f"the cache '{kind}' is one of transformers.", "--engine transformers, packed or compile; or no --cache"
            )

    def round(self, ids: Tensor, new_tokens: int) -> Round:
        """Read prompts (batch x tokens) and generate greedily, timed."""
        raise NotImplementedError


class Engine:
    """A way to run models.

    Attributes:
        id: its name on the command line.
        title: one line for people.
    """

    id: ClassVar[str]
    title: ClassVar[str]

    def load(self, model: str | Path, loading: Loading) -> Running:
        """Load a model.

        Raises:
            SlimrankError: a model that cannot be read, or that the engine does not run.
        """
        raise NotImplementedError

    def versions(self) -> dict[str, str]:
        """Return the versions of what computes."""
        raise NotImplementedError


CACHES = ("dynamic", "latent", "latent-int8")
ENGINES: Registry[Any] = Registry("slimrank.evaluate.engines", "engine")  # of subclasses of Engine
