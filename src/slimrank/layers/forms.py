"""The forms that fit every weight, pairs of factors and pivots; other files register more."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from slimrank.errors import RecipeError, nearest
from slimrank.layers.base import look_up
from slimrank.layers.layer_form import FORMS, LayerForm
from slimrank.layers.low_rank import LowRankLinear
from slimrank.layers.pivot import INDEX_BYTES, PivotLinear
from slimrank.layers.quantized_forms import quantized_form
from slimrank.linalg.pivot import pivoted


class PairForm(LayerForm):
    """Two thin factors, B (m x r) and A (r x n): r (m + n) numbers."""

    name: ClassVar[str] = "pair"
    shares: ClassVar[bool] = True

    def stored(self, m: int, n: int, rank: int) -> int:
        """See `LayerForm.stored`."""
        return rank * (m + n)

    def shared(self, m: int, n: int, rank: int) -> int:
        """See `LayerForm.shared`."""
        return rank * n

    def more_tensors(self, places: int) -> int:
        """See `LayerForm.more_tensors`; both factors of tied layers are stored once."""
        return 1

    def build(self, A: Tensor, B: Tensor, bias: Tensor | None, dtype: torch.dtype) -> LowRankLinear:
        """See `LayerForm.build`."""
        return LowRankLinear.from_factors(A.to(dtype).contiguous(), B.to(dtype).contiguous(), _cast(bias, dtype))


class PivotForm(LayerForm):
    """r of the weight's own rows, and the coordinates of the others in them: r (m + n) - r^2 numbers, and an order."""

    name: ClassVar[str] = "pivot"

    def stored(self, m: int, n: int, rank: int) -> int:
        """See `LayerForm.stored`."""
        return rank * (m + n - rank)

    def index_bytes(self, m: int, n: int) -> int:
        """See `LayerForm.index_bytes`."""
        return INDEX_BYTES * min(m, n)

    def build(self, A: Tensor, B: Tensor, bias: Tensor | None, dtype: torch.dtype) -> PivotLinear:
        """See `LayerForm.build`.

        Raises:
            ValueError: a rank above min(m, n).
        """
        return pivot_layer(A, B, bias, dtype=dtype)


PAIR, PIVOT = FORMS["pair"], FORMS["pivot"]


def layer_form(name: str) -> LayerForm:
    """Return the form of a name; one with a colon in it is quantised: see `layers.quantized_forms`.

    Raises:
        RecipeError: there is none; the nearest names are in the hint.
    """
    if ":" in name:
        return quantized_form(name)
    found = look_up(FORMS, name)
    if found is None:
        raise RecipeError(f"there is no factor form '{name}'.", nearest(name, FORMS))
    return found


def pivot_layer(
    A: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    side: Literal["out", "in"] | None = None,
    *,
    dtype: torch.dtype,
) -> PivotLinear:
    """Return the layer y = B A x + bias in some of its own rows or columns: see `linalg.pivot`.

    Args:
        A: rank x in.
        B: out x rank.
        bias: out, or None.
        side: rows ("out") or columns ("in"); by default those of which there are fewer.
        dtype: what the parts are stored in.

    Raises:
        ValueError: a rank above min(out, in).
    """
    found = pivoted(A, B, side)
    parts = found.skeleton.to(dtype), found.interpolation.to(dtype)
    return PivotLinear.from_parts(found.side, *parts, found.order, _cast(bias, dtype))


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)
