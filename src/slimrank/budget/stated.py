"""A budget stated in any of three ways, as parameters that the targets may store, and back again."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Literal

DIGITS = 10**4  # of a fraction in a hint


@dataclass(frozen=True)
class Budget:
    """How small a model is to get.

    Attributes:
        option: keep_ratio, of the targets' parameters; keep_total, of the whole model's; or max_bytes, of all weights.
        value: a fraction, or bytes.
        targets: parameters of the targets before compression.
        total: parameters of the whole model.
        itemsize: bytes per parameter of the targets, of the widest ones where they differ.
        headers: bytes that files take besides all parameters at that size: headers, buffers, and what wider parts
            take more. Less than 0 where many parts are narrower.
        added: parameters that compressing adds to the model.
    """

    option: Literal["keep_ratio", "keep_total", "max_bytes"]
    value: float
    targets: int
    total: int
    itemsize: int = 1
    headers: int = 0
    added: int = 0

    @property
    def rest(self) -> int:
        """Parameters that are counted besides those of the targets."""
        return self.added + (0 if self.option == "keep_ratio" else self.total - self.targets)

    @property
    def parameters(self) -> int:
        """Parameters that the targets together may store; 0 where there is no room for any."""
        if self.option == "max_bytes":
            allowed = (int(self.value) - self.headers) // self.itemsize
        else:
            allowed = int(Fraction(str(self.value)) * self._whole)
        return max(0, min(allowed - self.rest, self.targets))

    def needed(self, parameters: int) -> str:
        """The least value at which the targets may store so many parameters, in words, rounded up."""
        stored = parameters + self.rest
        taken = f" (parts that are not compressed already take {self.rest:,} parameters)" if self.rest else ""
        if self.option == "max_bytes":
            return f"a max_bytes of at least {stored * self.itemsize + self.headers}{taken}"
        least = Fraction(ceil(Fraction(stored, self._whole) * DIGITS), DIGITS)
        if least > 1:
            return f"less to store: no {self.option} is enough{taken}"
        return f"a {self.option} of at least {float(least):.4f}{taken}"

    @property
    def _whole(self) -> int:
        return self.targets if self.option == "keep_ratio" else self.total
