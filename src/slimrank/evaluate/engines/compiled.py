"""transformers with its blocks compiled by torch.compile."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import ClassVar

from slimrank.errors import SlimrankError
from slimrank.evaluate.engine import ENGINES, Running
from slimrank.evaluate.engines.eager import Eager, EagerModel
from slimrank.evaluate.options import Loading
from slimrank.models.placement import resolve_device
from slimrank.models.structure import find_blocks

COMPILERS = ("g++", "clang++", "c++", "cl")  # what torch compiles for a CPU with


@ENGINES.add
class Compiled(Eager):
    """Every block by torch.compile; the first round, which compiles, does not count."""

    id: ClassVar[str] = "compile"
    title: ClassVar[str] = "transformers, each block compiled by torch.compile"

    def load(self, model: str | Path, loading: Loading) -> Running:
        """See `Engine.load`.

        Raises:
            SlimrankError: there is no compiler for the CPU.
        """
        if resolve_device(loading.device).type == "cpu" and not _has_compiler():
            raise SlimrankError("torch.compile needs a C++ compiler, and there is none.", "install g++, or set CXX")
        running = super().load(model, loading)
        assert isinstance(running, EagerModel)
        for block in find_blocks(running.model)[1]:
            block.compile(dynamic=True)
        return running


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), *COMPILERS) if name)
