"""Statistics of layer inputs, gathered by hooks while a block runs.

Keyed by input tensor and not by module: layers that read the same tensor (q, k and v; gate and up) are one group
and share one Gram. All statistics are additive over tokens, so shards and batches merge exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.errors import ModelError, NonFiniteError
from slimrank.linalg.symmetric import mirror_upper, upper_gram

CHUNK = 8192  # tokens summed in float32 before they are added to the float64 accumulator


@dataclass
class InputStatistics:
    """Sums over the tokens that one group of layers reads.

    Attributes:
        upper: sum of x x^T (n x n, float64); only the block upper triangle is filled, see `gram`.
        total: sum of x (n, float64).
        count: number of tokens summed.
    """

    upper: Tensor
    total: Tensor
    count: int = 0

    @classmethod
    def empty(cls, n: int, device: torch.device | str = "cpu") -> InputStatistics:
        """Statistics of no tokens."""
        zeros = torch.zeros(n, n, dtype=torch.float64, device=device)
        return cls(zeros, torch.zeros(n, dtype=torch.float64, device=device))

    @property
    def gram(self) -> Tensor:
        """Sum of x x^T (n x n, float64), symmetric: the accumulator itself, not a copy."""
        return mirror_upper(self.upper)

    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            x: (..., n), any float dtype.
            mask: one entry per token, 0 where it is padding.
        """
        rows = x.reshape(-1, x.shape[-1])
        if mask is not None:
            rows = rows[mask.reshape(-1).to(rows.device, torch.bool)]
        for chunk in rows.split(CHUNK):
            wide = chunk if chunk.dtype == torch.float64 else chunk.float()
            partial = upper_gram(wide, wide.new_zeros(self.upper.shape))
            self.upper += partial.to(self.upper.device)
            self.total += wide.sum(dim=0).to(self.upper.device)
        self.count += len(rows)

    def __add__(self, other: InputStatistics) -> InputStatistics:
        return InputStatistics(self.upper + other.upper, self.total + other.total, self.count + other.count)


@dataclass
class StatisticsCollector:
    """Gathers `InputStatistics` for some layers of a block.

    Attributes:
        layers: module path -> module.
        device: where sums are kept.
        leaders: module path -> path of the first layer seen to read the same tensor (itself, if none).
        statistics: leader -> its sums.
    """

    layers: dict[str, nn.Module]
    device: torch.device
    leaders: dict[str, str] = field(default_factory=dict)
    statistics: dict[str, InputStatistics] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._mask: Tensor | None = None
        self._seen: list[tuple[Tensor, int, str]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> StatisticsCollector:
        for path, layer in self.layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._hook(path)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._seen = []

    def begin(self, mask: Tensor | None) -> None:
        """A new batch is coming, with this padding mask."""
        self._mask, self._seen = mask, []

    def of(self, path: str) -> InputStatistics:
        """The statistics of what a layer reads.

        Raises:
            NonFiniteError: NaN or infinity among its inputs.
        """
        found = self.statistics[self.leaders[path]]
        if not bool(torch.isfinite(found.total).all() & torch.isfinite(found.upper).all()):
            raise NonFiniteError(
                f"NaN or infinity in the inputs of layer '{path}'.",
                "run in float32 (--dtype float32); check that the model itself is sound",
            )
        return found

    def _hook(self, path: str) -> Any:
        def observe(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            leader = next((name for known, version, name in self._seen if _same(known, version, x)), None)
            if leader is None:
                self._seen.append((x, x._version, path))
                leader = self._accumulate(path, x)
            if self.leaders.setdefault(path, leader) != leader:
                raise ModelError(
                    f"the layer '{path}' reads the same tensor as '{leader}' in some batches only.",
                    f"leave it out: --ignore '{path}'",
                )

        return observe

    def _accumulate(self, path: str, x: Tensor) -> str:
        if path not in self.statistics:
            self.statistics[path] = InputStatistics.empty(x.shape[-1], self.device)
        mask = self._mask if self._mask is not None and self._mask.numel() == x[..., 0].numel() else None
        self.statistics[path].add(x.detach(), mask)
        return path


def _same(known: Tensor, version: int, x: Tensor) -> bool:
    """Whether x is the same memory as a tensor seen before, with the same content.

    The reference held to it rules out that the memory was given to another tensor since, its version that it was
    changed in place.
    """
    return (
        known.data_ptr() == x.data_ptr()
        and version == x._version
        and (known.shape, known.stride(), known.dtype) == (x.shape, x.stride(), x.dtype)
    )
