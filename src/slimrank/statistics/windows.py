"""Output gradients and inputs of each window of a batch, joined from all calls of a layer."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Part = tuple[Tensor, Tensor]  # output gradients and inputs of some rows


@dataclass
class BatchWindows:
    """Inputs and gradients of a layer's calls on one batch. One pass of the model may call a layer several times.

    Attributes:
        expected: path of a layer -> calls whose gradients are still to come.
        parts: path of a layer -> window -> inputs and gradients of its calls.
    """

    expected: Counter[str] = field(default_factory=Counter)
    parts: dict[str, dict[int, list[Part]]] = field(default_factory=lambda: defaultdict(dict))

    def add(self, path: str, gradients: Mapping[int, Tensor], inputs: Mapping[int, Tensor]) -> None:
        """Add the rows of each window that one call has seen."""
        self.expected[path] -= 1
        for window, rows in gradients.items():
            self.parts[path].setdefault(window, []).append((rows, inputs[window]))

    def complete(self, path: str) -> Iterator[Part]:
        """Return the windows of a layer, in order, once gradients of all its calls are there; each of them once."""
        return self.take(path) if self.expected[path] == 0 else iter(())

    def take(self, path: str) -> Iterator[Part]:
        """Return the windows of a layer, in order, and forget them."""
        for _, parts in sorted(self.parts.pop(path, {}).items(), key=lambda item: item[0]):
            gradients, inputs = zip(*parts, strict=True)
            yield torch.cat(gradients), torch.cat(inputs)
