"""Pivot layers of few bits."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from slimrank.layers.pivot import INDEX_BYTES, PivotLinear
from slimrank.layers.quantized_forms import Part, QuantizedForm, Rank, ranks_to_try, rounded_part
from slimrank.linalg.regression import Regression, best_b

SKELETON, INTERPOLATION = "skeleton", "interpolation"


class QuantizedPivot(QuantizedForm):
    """The part that reads the inputs, rounded first, and the other, which makes up for that before it is rounded.

    The rows that a pivot layer keeps are those that all others come from, so their rounding is amplified: without the
    second step these layers are destroyed by it.
    """

    base: ClassVar[str] = "pivot"
    least_nearest: ClassVar[int] = PivotLinear.least_nearest

    @classmethod
    def choices(cls, m: int, n: int, group: int | None) -> list[tuple[str, Rank]]:
        """See `QuantizedForm.choices`: the interpolation in 8 bits, or as many as the skeleton."""
        ranks = [rank for rank in ranks_to_try(min(m, n), group) if cls._is_whole(m, n, int(rank), group)]
        return [(name, rank) for rank in ranks for name in ("pivot:{}", "pivot:{}/int8")]

    @staticmethod
    def _is_whole(m: int, n: int, rank: int, group: int | None) -> bool:
        """Tell whether groups divide the columns of the interpolation."""
        return group is None or m <= n or (n - rank) % group == 0

    def index_bytes(self, m: int, n: int) -> int:
        """See `LayerForm.index_bytes`."""
        return super().index_bytes(m, n) + INDEX_BYTES * min(m, n)

    def more_tensors(self, places: int) -> int:
        """See `LayerForm.more_tensors`; the order is one more."""
        return super().more_tensors(places) + places

    def parts(self, m: int, n: int, rank: int) -> list[Part]:
        """See `QuantizedForm.parts`."""
        if m <= n:
            return [Part(SKELETON, rank, n, self.first), Part(INTERPOLATION, m - rank, rank, self.other)]
        return [Part(SKELETON, m, rank, self.first), Part(INTERPOLATION, rank, n - rank, self.other)]

    def unrounded(self, m: int, n: int, rank: int, dtype: torch.dtype) -> PivotLinear:
        """See `QuantizedForm.unrounded`."""
        return PivotLinear(n, m, rank, side="out" if m <= n else "in", dtype=dtype)

    def fit(self, problem: Regression, start: Any, rank: int, dtype: torch.dtype) -> PivotLinear:
        """See `QuantizedForm.fit`."""
        parts = self._of_rows if start.side == "out" else self._of_columns
        skeleton, interpolation = parts(problem, start, dtype)
        layer = PivotLinear(start.in_features, start.out_features, start.rank, side=start.side, device="meta")
        layer.skeleton, layer.interpolation, layer.order = skeleton, interpolation, start.order
        return layer

    def _of_rows(self, problem: Regression, start: PivotLinear, dtype: torch.dtype) -> tuple[Any, Any]:
        skeleton, s = rounded_part(_of(start.skeleton, problem), problem.gram, self.first, dtype)
        rest = start.order.long().argsort()[start.rank :].to(s.device)
        best = best_b(problem, s)[rest]
        return skeleton, rounded_part(best, s @ problem.gram @ s.t(), self.other, dtype)[0]

    def _of_columns(self, problem: Regression, start: PivotLinear, dtype: torch.dtype) -> tuple[Any, Any]:
        order = start.order.long().to(problem.gram.device)
        pivots, rest = order[: start.rank], order[start.rank :]
        interpolation, t = rounded_part(
            _of(start.interpolation, problem), problem.gram[rest][:, rest], self.other, dtype
        )
        z = torch.zeros(start.rank, start.in_features, dtype=t.dtype, device=t.device)
        z[:, pivots], z[:, rest] = torch.eye(start.rank, dtype=t.dtype, device=t.device), t
        return rounded_part(best_b(problem, z), z @ problem.gram @ z.t(), self.first, dtype)[0], interpolation


def _of(part: Any, problem: Regression) -> Tensor:
    return part.weight.detach().to(problem.gram)
