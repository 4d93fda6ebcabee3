"""Weights as integers times a scale: the grid of a weight, and rounding to the nearest point of it.

W ~ (q - z) s,   q integers of b bits, a scale s and an integer z for each group of columns of a row
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimrank.linalg.scheme import Scheme

SHRINKING = 26  # ranges that are tried for each group ..
NARROWEST = 0.5  # .. down to this fraction of that of its numbers


@dataclass(frozen=True)
class Grid:
    """The numbers that each group of a weight can have.

    Attributes:
        scheme: how many, and what a group is.
        scale: rows x groups, float64, of values that the stored dtype holds.
        zero: rows x groups, float64 integers; 0 where the scheme is symmetric.
        dtype: of the stored scale; numbers are rounded to it, too.
    """

    scheme: Scheme
    scale: Tensor
    zero: Tensor
    dtype: torch.dtype

    def values(self, codes: Tensor) -> Tensor:
        """Return the numbers of integers (rows x columns), as loading does: in the stored dtype, as float64."""
        parts = codes.unflatten(1, (self.scale.shape[1], -1)) - self.zero[..., None]
        return (parts.to(self.dtype) * self.scale[..., None].to(self.dtype)).flatten(1).to(codes)

    def nearest(self, weight: Tensor) -> Tensor:
        """Return the integers nearest to a weight (rows x columns)."""
        parts = weight.unflatten(1, (self.scale.shape[1], -1)) / self.scale[..., None]
        return (parts + self.zero[..., None]).round_().clamp_(*self.scheme.codes).flatten(1)

    def by_column(self, columns: int) -> Columns:
        """Return the grid of each column, of a weight with so many."""
        group = self.scheme.columns(columns)
        scale, zero = (x.t().repeat_interleave(group, 0) for x in (self.scale, self.zero))
        return Columns(scale, zero, self)


@dataclass(frozen=True)
class Columns:
    """A grid, to round one column after the other.

    Attributes:
        scale: columns x rows.
        zero: columns x rows.
        grid: as a whole.
    """

    scale: Tensor
    zero: Tensor
    grid: Grid

    def codes(self, numbers: Tensor, column: int) -> Tensor:
        """Return the integers nearest to the numbers (rows) of a column."""
        codes = torch.addcdiv(self.zero[column], numbers, self.scale[column])
        return codes.round_().clamp_(*self.grid.scheme.codes)

    def values(self, codes: Tensor, column: int) -> Tensor:
        """Return the numbers of the integers (rows) of a column; see `Grid.values`."""
        dtype = self.grid.dtype
        return ((codes - self.zero[column]).to(dtype) * self.scale[column].to(dtype)).to(codes)


@dataclass(frozen=True)
class Rounded:
    """A weight as integers on a grid.

    Attributes:
        codes: rows x columns, float64 integers.
        grid: what they stand for.
    """

    codes: Tensor
    grid: Grid

    def values(self) -> Tensor:
        """Return the weight (rows x columns), float64, of values that the stored dtype holds."""
        return self.grid.values(self.codes)


def grid_of(weight: Tensor, scheme: Scheme, dtype: torch.dtype, importance: Tensor | None = None) -> Grid:
    """Choose the grid of each group: of several ranges, the one of least squared error when rounded to the nearest.

    Args:
        weight: rows x columns, float64.
        scheme: integers and groups.
        dtype: what scales are stored in.
        importance: of the columns (columns), for that error.

    Raises:
        ValueError: columns that are not whole groups.
    """
    rows, columns = weight.shape
    if not scheme.divides(columns):
        raise ValueError(f"groups of {scheme.group} do not divide {columns} columns")
    x = weight.reshape(rows, -1, scheme.columns(columns))
    each = torch.ones_like(x[:1]) if importance is None else importance.reshape(1, *x.shape[1:])
    best = torch.full(x.shape[:2], torch.inf, dtype=x.dtype, device=x.device)
    scale, zero = torch.ones_like(best), torch.zeros_like(best)
    for fraction in torch.linspace(1.0, NARROWEST, SHRINKING).tolist():
        tried = _range(x, scheme, dtype, fraction)
        error = (_nearest(x, scheme, *tried) - x).square_().mul_(each).sum(-1)
        better = error < best
        best, scale, zero = (
            torch.where(better, *pair) for pair in ((error, best), (tried[0], scale), (tried[1], zero))
        )
    return Grid(scheme, scale, zero, dtype)


def nearest(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Rounded:
    """Round every number of a weight (rows x columns) to the nearest; see `grid_of`."""
    w = weight.to(torch.float64)
    grid = grid_of(w, scheme, dtype)
    return Rounded(grid.nearest(w), grid)


def _range(x: Tensor, scheme: Scheme, dtype: torch.dtype, fraction: float) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of groups (rows x groups x columns) for a fraction of the range of their numbers."""
    low, high = x.amin(-1).clamp(max=0) * fraction, x.amax(-1).clamp(min=0) * fraction
    least, most = scheme.codes
    if scheme.symmetric:
        scale = _stored(torch.maximum(-low, high) * 2 / (most - least), dtype)
        return scale, torch.zeros_like(scale)
    scale = _stored((high - low) / (most - least), dtype)
    return scale, (least - low / scale).round_().clamp_(least, most)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scales as the dtype holds them, none of them zero."""
    return scale.to(dtype).clamp_(min=torch.finfo(dtype).tiny).to(scale)


def _nearest(x: Tensor, scheme: Scheme, scale: Tensor, zero: Tensor) -> Tensor:
    codes = (x / scale[..., None]).add_(zero[..., None]).round_().clamp_(*scheme.codes)
    return codes.sub_(zero[..., None]).mul_(scale[..., None])
