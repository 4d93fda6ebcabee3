"""Tell transformers about compressed models, now or as soon as it is imported."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_AWAITED = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Register the configuration class with `AutoConfig` (importing transformers, if need be).

    Everything else is registered when a configuration is read.
    """
    from transformers import AutoConfig

    from slimrank.checkpoint.configuration_slimrank import MODEL_TYPE, SlimRankConfig

    AutoConfig.register(MODEL_TYPE, SlimRankConfig, exist_ok=True)


def register_lazily() -> None:
    """Register at once when transformers is imported already, else the moment it is."""
    if _AWAITED in sys.modules:
        register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Waits for one module of transformers, hands it to the usual finders, and registers after it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`; only the awaited module is of interest, and only once."""
        if name != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: importlib.abc.Loader) -> None:
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        register()

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)
