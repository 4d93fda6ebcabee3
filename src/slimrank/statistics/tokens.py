"""Find the token of a batch that each row of a layer's input belongs to, whatever the shape of that input."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """The tokens of a batch, numbered window after window.

    Attributes:
        mask: windows x tokens, 1 = a real token; None: all are.
        shape: (windows, tokens); None: that of the mask, or of any tensor of three dimensions.
    """

    mask: Tensor | None = None
    shape: tuple[int, ...] | None = None

    def shape_beside(self, x: Tensor) -> tuple[int, ...] | None:
        """Return (windows, tokens) of a tensor (..., n), as far as known; it may count others (pooled, learnt)."""
        leading = tuple(x.shape[:-1])
        shape = self.shape if self.mask is None else tuple(self.mask.shape)
        if shape is None:
            return leading if len(leading) == 2 else None
        others = len(leading) == 2 and leading[0] == shape[0] and rows_per_token(leading, *shape) is None
        return leading if others else shape

    def numbers(self, x: Tensor) -> Tensor | None:
        """Return the token of each row of a tensor (..., n), if its shape tells them: see `rows_per_token`."""
        shape = self.shape_beside(x)
        repeats = None if shape is None else rows_per_token(tuple(x.shape[:-1]), *shape)
        if shape is None or repeats is None:
            return None
        tokens = torch.arange(shape[0] * shape[1], device=x.device)
        return tokens if repeats == 1 else tokens.repeat_interleave(repeats)

    def real(self, x: Tensor, numbers: Tensor | None) -> Tensor:
        """Return the rows (rows x n) of a tensor (..., n) that belong to real tokens; all if that is unknown."""
        rows, mask = x.reshape(-1, x.shape[-1]), self._mask_of(x)
        return rows if mask is None or numbers is None else rows[mask.flatten()[numbers]]

    def places(self, x: Tensor, numbers: Tensor | None) -> Places | None:
        """Return the indices of the real rows of a tensor; None if they are unknown."""
        shape, mask = self.shape_beside(x), self._mask_of(x)
        if shape is None or numbers is None:
            return None
        real = torch.ones(shape, dtype=torch.bool, device=x.device) if mask is None else mask
        chosen = numbers[real.flatten()[numbers]]
        position = real.cumsum(dim=1).flatten()[chosen] - 1
        return Places(chosen // shape[1], position, real.sum(dim=1))

    def _mask_of(self, x: Tensor) -> Tensor | None:
        """Return which tokens are real; None if all are, or if a tensor counts others."""
        if self.mask is None or self.shape_beside(x) != tuple(self.mask.shape):
            return None
        return self.mask.to(x.device, torch.bool)


@dataclass(frozen=True)
class Places:
    """Positions of rows: their windows, and their real tokens in them.

    Attributes:
        window: of each row, ascending.
        position: of each row, among the real tokens of its window.
        lengths: real tokens of each window.
    """

    window: Tensor
    position: Tensor
    lengths: Tensor

    def by_window(self, rows: Tensor) -> dict[int, Tensor]:
        """Return the rows of each window that has some."""
        windows, counts = torch.unique_consecutive(self.window, return_counts=True)
        return dict(zip(windows.tolist(), rows.split(counts.tolist()), strict=True))


def rows_per_token(leading: tuple[int, ...], windows: int, tokens: int) -> int | None:
    """Count the rows of each token in a tensor of these leading dimensions; None if rows do not follow tokens.

    Windows come first, then tokens, either of them in one dimension or several; or both are flattened into one. Further
    dimensions belong to one token (heads). A tensor of tokens x windows, or with anything before windows, does not fit.
    """
    sizes = [size for size in leading if size != 1]
    ends = [1, *accumulate(sizes, mul)]
    whole = windows * tokens
    flat = bool(sizes) and sizes[0] == whole
    if whole == 0 or whole not in ends or not (flat or windows in ends[: ends.index(whole) + 1]):
        return None
    return ends[-1] // whole
