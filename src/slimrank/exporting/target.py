"""The contract of an engine that models are exported for: convert, round weights, write, run.

A target is a subclass of `Target` in a file of its own; `TARGETS.add` registers it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from slimrank.exporting.cached_step import CachedStep
from slimrank.exporting.record import ExportRecord
from slimrank.exporting.runner import Runner
from slimrank.registry import Registry


class Target:
    """An engine to export for. Its graph is whatever it computes with in memory.

    Attributes:
        id: its name on the command line.
        title: of what runs the result, for people.
    """

    id: ClassVar[str]
    title: ClassVar[str]

    def need(self, weights: str | None) -> str:
        """Make sure that all packages are here, and return the version of what runs the result.

        Raises:
            MissingExtraError: one is not installed.
            SlimrankError: one is too old.
        """
        raise NotImplementedError

    def convert(self, step: CachedStep) -> Any:
        """Return the graph of a model, with its weights in float32.

        Raises:
            ModelError: there is none.
        """
        raise NotImplementedError

    def runner(self, graph: Any | Path) -> Runner:
        """Return the runner of a graph, or of a folder that was written."""
        raise NotImplementedError

    def with_weights(self, graph: Any, model: Any, record: ExportRecord) -> Any:
        """Return the graph with weights as the record says, and say in the record what became of them."""
        raise NotImplementedError

    def write(self, graph: Any, tokenizer: Any, folder: Path, record: ExportRecord) -> None:
        """Write the graph into an existing folder, and count its numbers and bytes in the record.

        Args:
            graph: with weights as the record says.
            tokenizer: of the model, for engines that hold it in the same file.
            folder: to write to.
            record: of the export.
        """
        raise NotImplementedError

    def write_tokenizer(self, tokenizer: Any, folder: Path) -> list[str]:
        """Write the tokenizer in a form of the engine's own, where it has one; return notes."""
        return []


TARGETS: Registry[Any] = Registry("slimrank.exporting.targets", "engine")  # of subclasses of Target
