"""Sums over tokens. All are additive: chunks, batches and shards merge exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slimrank.linalg.outliers import hides_small_spectrum
from slimrank.linalg.symmetric import gram, mirror_upper

CHUNK_TOKENS = 8192  # tokens summed in float32 before they are added to the float64 accumulator
CACHED_NUMBERS = 2**17  # numbers of float64: of a CPU's cache


@dataclass
class GramSum:
    """Sum of v v^T over token vectors v in R^n.

    Attributes:
        upper: the sum (n x n, float64); only the block upper triangle is filled, see `gram`.
        total: sum of v (n, float64).
        count: number of tokens.
    """

    upper: Tensor
    total: Tensor
    count: int = 0

    @classmethod
    def empty(cls, n: int, device: torch.device | str = "cpu") -> GramSum:
        """Return the sum of no tokens."""
        zeros = torch.zeros(n, n, dtype=torch.float64, device=device)
        return cls(zeros, torch.zeros(n, dtype=torch.float64, device=device))

    @property
    def gram(self) -> Tensor:
        """Sum of v v^T (n x n, float64), symmetric: the accumulator itself, not a copy."""
        return mirror_upper(self.upper)

    def add(self, rows: Tensor) -> bool:
        """Add tokens (tokens x n); says whether the sum is still finite.

        Products are of float32, and of float64 where a few directions outweigh all others.
        """
        finite = True
        for chunk in rows.split(CHUNK_TOKENS):
            wide = chunk if chunk.dtype == torch.float64 else chunk.float()
            partial = gram(wide)
            finite = finite and bool(torch.isfinite(partial.diagonal()).all())
            if finite and wide.dtype != torch.float64 and hides_small_spectrum(partial):
                wide = wide.to(self.upper.device).double()  # in this order: mps has no float64
                partial = gram(wide)
            self.upper += partial.to(self.upper.device)
            self.total += wide.sum(dim=0).to(self.upper.device)
        self.count += len(rows)
        return finite

    def __add__(self, other: GramSum) -> GramSum:
        return GramSum(self.upper + other.upper, self.total + other.total, self.count + other.count)


@dataclass
class ChannelSums:
    """Sums over tokens for each channel (n, float64)."""

    absolute: Tensor
    largest: Tensor
    squares: Tensor
    count: int = 0

    @classmethod
    def empty(cls, n: int, device: torch.device | str = "cpu") -> ChannelSums:
        """Return the sums of no tokens."""
        zeros = torch.zeros(3, n, dtype=torch.float64, device=device)
        return cls(zeros[0], zeros[1], zeros[2])

    def add(self, rows: Tensor) -> bool:
        """Add tokens (tokens x n); says whether they are finite."""
        if len(rows) == 0:
            return True
        wide = rows.to(self.absolute.device).double()  # in this order: mps has no float64
        self.absolute += wide.abs().sum(dim=0)
        self.largest = torch.maximum(self.largest, wide.abs().amax(dim=0))
        self.squares += wide.square().sum(dim=0)
        self.count += len(rows)
        return bool(torch.isfinite(self.squares).all())

    def __add__(self, other: ChannelSums) -> ChannelSums:
        return ChannelSums(
            self.absolute + other.absolute,
            torch.maximum(self.largest, other.largest),
            self.squares + other.squares,
            self.count + other.count,
        )


@dataclass
class SampleGradients:
    """Weight gradients of single samples, G_i = g_i^T X_i (m x n), in the smaller form.

    Attributes:
        window: how many windows of text one sample sums over.
        dense: finished samples as G_i, where that takes no more numbers than
        tokens: finished samples as pairs (g_i: T x m, X_i: T x n).
    """

    window: int = 1
    dense: list[Tensor] = field(default_factory=list)
    tokens: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._open: list[tuple[Tensor, Tensor]] = []

    def __len__(self) -> int:
        self._close()
        return len(self.dense) + len(self.tokens)

    def add(self, g: Tensor, x: Tensor) -> None:
        """Add one window: output gradients (T x m) and inputs (T x n) of its tokens."""
        self._open.append((g, x))
        if len(self._open) == self.window:
            self._close()

    def _close(self) -> None:
        if not self._open:
            return
        gs, xs = zip(*self._open, strict=True)
        g, x = torch.cat(gs), torch.cat(xs)
        self._open = []
        if len(g) * (g.shape[1] + x.shape[1]) < g.shape[1] * x.shape[1]:
            self.tokens.append((g, x))
        else:
            self.dense.append(g.t() @ x)

    def row(self, column: Tensor) -> Tensor:
        """Sum of G_i V G_i^T (m x m) for a symmetric V (n x n)."""
        self._close()
        total = column.new_zeros(self.shape[0], self.shape[0])
        for dense in self.dense:
            d = dense.to(column)
            total += d @ column @ d.t()
        for g, x in self._wide_tokens(column):
            total += g.t() @ (x @ column @ x.t()) @ g
        return total

    def column(self, row: Tensor) -> Tensor:
        """Sum of G_i^T Z G_i (n x n) for a symmetric Z (m x m)."""
        self._close()
        total = row.new_zeros(self.shape[1], self.shape[1])
        for dense in self.dense:
            d = dense.to(row)
            total += d.t() @ row @ d
        for g, x in self._wide_tokens(row):
            total += x.t() @ (g @ row @ g.t()) @ x
        return total

    @property
    def shape(self) -> tuple[int, int]:
        """Return (m, n); there must be a sample."""
        if self.dense:
            return self.dense[0].shape[0], self.dense[0].shape[1]
        return self.tokens[0][0].shape[1], self.tokens[0][1].shape[1]

    def _wide_tokens(self, like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for g, x in self.tokens:
            yield g.to(like), x.to(like)


def squares_of(rows: Tensor) -> Tensor:
    """Return the sum of squares of each channel (n, float64) over tokens (tokens x n), a few tokens at a time."""
    parts = rows.split(max(1, CACHED_NUMBERS // rows.shape[1]))
    return torch.stack([part.double().square().sum(dim=0) for part in parts]).sum(dim=0)


def weight_gradient_squares(g: Tensor, x: Tensor) -> Tensor:
    """Sum the squares of g^T x by column (n, float64), from g (T x m) and x (T x n), in the cheaper of two ways.

    Gradients are scaled to 1 before they are squared: those of a long text would underflow in float32.
    """
    t, m, n = len(g), g.shape[1], x.shape[1]
    wide = torch.promote_types(g.dtype, torch.float32)
    scale = float(g.abs().amax()) if t else 0.0
    wide_g, wide_x = (g.to(wide) / scale if scale > 0 else g.to(wide)), x.to(wide)
    if t * (m + n) < m * n:
        sums = ((wide_g @ wide_g.t() @ wide_x) * wide_x).sum(dim=0).clamp(min=0)  # rounding, where gradients cancel
    else:
        sums = (wide_g.t() @ wide_x).square().sum(dim=0)
    return sums.cpu().double() * scale**2
