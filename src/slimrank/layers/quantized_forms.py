"""Forms whose weights are integers of a few bits: dense weights, pairs, pivots, and residuals (few bits and a pair).

Their names say what each part is rounded to: "dense:int4-g64", "pair:int5-g64", "pivot:int4-g64/int8" (skeleton, and
interpolation), "residual:int3-g64/int8" (the weight, and the pair that corrects it; "float" keeps the pair as it is).
A form of this kind is not built from factors but fitted: its parts are rounded one after the other, each with regard to
the inputs, and the part that is still free makes up for the rounding of those before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from slimrank.errors import RecipeError
from slimrank.errors import nearest as nearest_name
from slimrank.layers.base import CompressedLinear, import_neighbours
from slimrank.layers.layer_form import USUAL_WIDTH_BITS, LayerForm
from slimrank.layers.quantized import QuantizedLinear
from slimrank.linalg.gptq import gptq
from slimrank.linalg.regression import Regression
from slimrank.linalg.rounding import nearest
from slimrank.linalg.scheme import Scheme

SHAPE_BYTES = 16  # of the shape that is stored beside packed integers
TENSORS = 4  # at most, of a part
RANKS_TO_TRY = 8  # parts that the largest rank is cut into
FLOAT = "float"  # a part whose numbers stay as wide as those of the dense weight
BASES: dict[str, type[QuantizedForm]] = {}
Rank = int | Literal["dense"]


@dataclass(frozen=True)
class Part:
    """One stored matrix of a layer.

    Attributes:
        name: of the module that holds it; empty for the layer itself.
        rows: outputs.
        columns: inputs.
        scheme: what it is rounded to; None: not at all.
    """

    name: str
    rows: int
    columns: int
    scheme: Scheme | None

    @property
    def is_whole(self) -> bool:
        """Tell whether its rows are made of whole groups."""
        return self.scheme is None or not self.rows or not self.columns or self.scheme.divides(self.columns)

    def linear(self, **place: Any) -> nn.Linear:
        """Return a layer of this size without values; `place` is its device and dtype."""
        if self.scheme is None or not self.rows or not self.columns:
            return nn.Linear(self.columns, self.rows, bias=False, **place)
        return QuantizedLinear(self.columns, self.rows, self.scheme, **place)

    def stored_bits(self, width: int) -> int:
        """Return its bits on disk, where a number that is not rounded has `width`."""
        if self.scheme is None:
            return self.rows * self.columns * width
        return self.scheme.stored_bits(self.rows, self.columns, width)


class QuantizedForm(LayerForm):
    """A form whose parts are rounded. A subclass sets `base`, and has `parts` and `fit`.

    Attributes:
        base: the form that its parts are those of; "dense" is the weight itself.
        first: scheme of the first part.
        other: scheme of the other parts; None leaves them as they are.
        least_nearest: fewest bits at which rounding to the nearest does not destroy the layer.
    """

    base: ClassVar[str]
    least_nearest: ClassVar[int] = 2

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        BASES[cls.base] = cls

    def __init__(self, name: str, first: Scheme, other: Scheme | None) -> None:
        self.name, self.first, self.other = name, first, other  # type: ignore[misc]

    @classmethod
    def choices(cls, m: int, n: int, group: int | None) -> list[tuple[str, Rank]]:
        """Return what a layer may become where forms are chosen: names, {} where the scheme stands, and ranks.

        Args:
            m: outputs.
            n: inputs.
            group: columns that share a scale; None: all of a row.
        """
        return [(cls.base + ":{}", rank) for rank in ranks_to_try(min(m, n), group)]

    def parts(self, m: int, n: int, rank: int) -> list[Part]:
        """Return the matrices that a layer of this rank stores."""
        raise NotImplementedError

    def fit(self, problem: Regression, start: nn.Module, rank: int, dtype: torch.dtype) -> nn.Module:
        """Return the layer that answers a least-squares problem best, as far as rounding lets it; without a bias.

        Args:
            problem: sums over the inputs of the layer and the outputs that it is to have.
            start: the layer as it is before rounding.
            rank: of the layer, where it has one.
            dtype: of scales, and of what is not rounded.
        """
        raise NotImplementedError

    def empty(self, m: int, n: int, rank: int, dtype: torch.dtype) -> Any:
        """Return a layer of the form whose values are to be loaded; without a bias."""
        layer = self.unrounded(m, n, rank, dtype)
        for part in self.parts(m, n, rank):
            layer.set_submodule(part.name, part.linear(dtype=dtype))
        return layer

    def unrounded(self, m: int, n: int, rank: int, dtype: torch.dtype) -> Any:
        """Return a layer whose parts are to be replaced by rounded ones."""
        raise NotImplementedError

    def nearest(self, start: Any, dtype: torch.dtype) -> Any:
        """Return the layer with every part of `start` rounded to the nearest, whatever its inputs; without a bias."""
        rank = getattr(start, "rank", 0)
        layer = self.unrounded(start.out_features, start.in_features, rank, dtype)
        layer.load_state_dict(start.state_dict(), strict=False)
        for part in self.parts(start.out_features, start.in_features, rank):
            weight = start.get_submodule(part.name).weight.detach().double()
            layer.set_submodule(part.name, rounded_part(weight, None, part.scheme, dtype)[0])
        return layer

    def fits(self, m: int, n: int, rank: int) -> bool:
        """Tell whether all parts are made of whole groups."""
        return all(part.is_whole for part in self.parts(m, n, rank))

    def stored(self, m: int, n: int, rank: int) -> int:
        """See `LayerForm.stored`."""
        return sum(part.rows * part.columns for part in self.parts(m, n, rank))

    def stored_bits(self, m: int, n: int, rank: int, width: int) -> int:
        """See `LayerForm.stored_bits`."""
        return sum(part.stored_bits(width) for part in self.parts(m, n, rank))

    def bits(self, m: int, n: int, rank: int | Literal["dense"], width: int = 1) -> int:
        """See `LayerForm.bits`; the weight of a layer that is not factored is rounded, too."""
        if rank == "dense":
            return Part("", m, n, self.first).stored_bits(width)
        return self.stored_bits(m, n, rank, width)

    def largest_rank(self, m: int, n: int, width: int = USUAL_WIDTH_BITS) -> int:
        """Return the largest rank that stores less than the weight itself, rounded; 0 where none does."""
        return max(0, self.within(m, n, self.bits(m, n, "dense", width) - 1, width))

    def index_bytes(self, m: int, n: int) -> int:
        """See `LayerForm.index_bytes`: the shapes that are stored beside packed integers."""
        return SHAPE_BYTES * len([part for part in self.parts(m, n, 1) if part.scheme is not None])

    def more_tensors(self, places: int) -> int:
        """See `LayerForm.more_tensors`: integers, scales, zero points and the shape, instead of a weight."""
        return (TENSORS * len(self.parts(2, 2, 1)) - 1) * places

    def build(self, A: Tensor, B: Tensor, bias: Tensor | None, dtype: torch.dtype) -> CompressedLinear:
        """Not possible without the inputs: see `fit`.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"layers of the form '{self.name}' are fitted to their inputs, not built from factors")


def ranks_to_try(largest: int, group: int | None) -> list[Rank]:
    """Return the ranks that a budget solver may choose from: multiples of a group, and no more than a few."""
    step = group or 1
    tried = {step * round(share * largest / RANKS_TO_TRY / step) for share in range(1, RANKS_TO_TRY)}
    return sorted(tried - {0, largest})


def quantized_bases() -> dict[str, type[QuantizedForm]]:
    """Return the forms that can be quantised, by the name of their parts' form."""
    import_neighbours()
    return BASES


@cache
def quantized_form(name: str) -> QuantizedForm:
    """Return the form of such a name.

    Raises:
        RecipeError: it is none.
    """
    base, _, schemes = name.partition(":")
    known = quantized_bases()
    if base not in known:
        raise RecipeError(f"'{base}' in '{name}' is not a form that can be quantised.", nearest_name(base, known))
    first, _, other = schemes.partition("/")
    try:
        rounded = Scheme.parse(first)
        others = None if other == FLOAT else Scheme.parse(other or first)
    except ValueError as error:
        raise RecipeError(f"form '{name}': {error}.", f"{base}:int4-g64") from error
    return known[base](name, rounded, others)


def rounded_part(
    weight: Tensor, gram: Tensor | None, scheme: Scheme | None, dtype: torch.dtype
) -> tuple[nn.Linear, Tensor]:
    """Round one matrix with regard to its inputs: return it as a layer, and its numbers in float64.

    Args:
        weight: rows x columns, float64.
        gram: of its inputs (columns x columns); None rounds to the nearest.
        scheme: None casts it only.
        dtype: of scales, or of the weight itself.
    """
    rows, columns = weight.shape
    if scheme is None or not columns or not rows:
        layer = nn.Linear(columns, rows, bias=False, device="meta")
        layer.weight = nn.Parameter(weight.to(dtype).contiguous())
        return layer, layer.weight.detach().to(weight)
    found = nearest(weight, scheme, dtype) if gram is None else gptq(weight, gram, scheme, dtype)
    values, zero = found.values(), None if scheme.symmetric else found.grid.zero.to(torch.int8)
    made = QuantizedLinear.holding(scheme, values.to(dtype).contiguous(), found.grid.scale.to(dtype), zero)
    return made, values
