"""What a weight is stored as, what that takes, and how it is made. Copied into saved models whose kind needs it.

A form is one subclass of `LayerForm`, registered by defining it, also from outside the package. It may stand in the
file of its kind of layers.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import ClassVar, Literal

import torch
from torch import Tensor

from slimrank.layers.base import CompressedLinear

FORMS: dict[str, LayerForm] = {}
USUAL_WIDTH_BITS = 16  # of a parameter of a dense weight


class LayerForm:
    """A way to store a weight of m x n at a rank.

    A subclass sets `name`, and has `stored` and `build`. One whose numbers are not as wide as those of the dense weight
    has `stored_bits`, too. Both only calculate: gradients of soft ranks go through them, so a rank may be a tensor.

    Attributes:
        name: as in recipes and plans.
        shares: layers can share the factor A.
    """

    name: ClassVar[str]
    shares: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in vars(cls):
            FORMS[cls.name] = cls()

    def stored(self, m: int, n: int, rank: int) -> int:
        """Return how many numbers a layer of this rank stores, a bias and an index left out."""
        raise NotImplementedError

    def stored_bits(self, m: int, n: int, rank: int, width: int) -> int:
        """Return how many bits these are, where a number of the dense weight has `width`."""
        return self.stored(m, n, rank) * width

    def shared(self, m: int, n: int, rank: int) -> int:
        """Return how many of the numbers are in A, which a layer that shares it does not store again."""
        return 0

    def index_bytes(self, m: int, n: int) -> int:
        """Return the bytes that a layer takes besides these numbers, at any rank; they do not count for a budget."""
        return 0

    def more_tensors(self, places: int) -> int:
        """Return how many more tensors a saved layer has than a dense one, at most; `places` counts the tied ones."""
        return 2 * places

    def build(self, A: Tensor, B: Tensor, bias: Tensor | None, dtype: torch.dtype) -> CompressedLinear:
        """Return the layer y = B A x + bias, its parts cast once.

        Args:
            A: rank x n, in as much precision as there is.
            B: m x rank.
            bias: m long, or None.
            dtype: what the dense weight is stored in.
        """
        raise NotImplementedError

    # what follows from these --------------------------------------------------------------------------------

    def parameters(self, m: int, n: int, rank: int | Literal["dense"]) -> int:
        """Return how many numbers are stored at a rank, or as the dense weight."""
        return m * n if rank == "dense" else self.stored(m, n, rank)

    def bits(self, m: int, n: int, rank: int | Literal["dense"], width: int = 1) -> int:
        """Return how many bits are stored at a rank, or as the dense weight; in parameters where `width` is 1."""
        return m * n * width if rank == "dense" else self.stored_bits(m, n, rank, width)

    def largest_rank(self, m: int, n: int, width: int = USUAL_WIDTH_BITS) -> int:
        """Return the largest rank that stores less than the dense weight; 0 where none does."""
        return max(0, self.within(m, n, m * n * width - 1, width))

    def within(self, m: int, n: int, bits: int, width: int = 1) -> int:
        """Return the largest rank up to min(m, n) that stores no more than so many bits; -1 below none."""
        ranks = range(min(m, n) + 1)
        return bisect_right(ranks, bits, key=lambda rank: self.stored_bits(m, n, rank, width)) - 1
