"""A budget stated in any of three ways, as bits that the targets may store, and back again."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Literal

FRACTION_STEPS = 10**4  # of a fraction in a hint
BYTE_BITS = 8
USUAL_WIDTH_BITS = 16  # of a parameter of a dense weight


@dataclass(frozen=True)
class Budget:
    """How small a model is to get.

    Attributes:
        option: keep_ratio, of the targets' parameters; keep_total, of the whole model's; or max_bytes, of all weights.
        value: a fraction, or bytes.
        targets: parameters of the targets before compression.
        total: parameters of the whole model.
        width: bits of a parameter. Fractions are of parameters: where weights have several widths, all count alike.
        besides: bytes that files take besides the targets' weights: other weights, buffers, headers.
        added: parameters that compressing adds to the model.
        target_bits: of the targets before compression, each in its own width; by default of `width`.
        unit: bits that divide those of every target.
    """

    option: Literal["keep_ratio", "keep_total", "max_bytes"]
    value: float
    targets: int
    total: int
    width: int = 1
    besides: int = 0
    added: int = 0
    target_bits: int | None = None
    unit: int | None = None

    @property
    def rest(self) -> int:
        """Parameters that are counted besides those of the targets."""
        return self.added + (0 if self.option == "keep_ratio" else self.total - self.targets)

    @property
    def bits(self) -> int:
        """Bits that the targets together may store; 0 where there is no room for any."""
        if self.option == "max_bytes":
            unit = self.unit or self.width
            allowed = (int(self.value) - self.besides) * BYTE_BITS // unit * unit
            return max(0, min(allowed, self.target_bits or self.targets * self.width))
        parameters = int(Fraction(str(self.value)) * self._whole) - self.rest
        return max(0, min(parameters, self.targets)) * self.width

    def needed(self, bits: int) -> str:
        """Return the least value at which the targets may store so many bits, in words, rounded up."""
        taken = f" (parts that are not compressed already take {self.rest:,} parameters)" if self.rest else ""
        if self.option == "max_bytes":
            narrower = "; or --dtype bfloat16" if self.width > USUAL_WIDTH_BITS else ""
            return f"a max_bytes of at least {ceil(Fraction(bits, BYTE_BITS)) + self.besides}{taken}{narrower}"
        stored = ceil(Fraction(bits, self.width)) + self.rest
        least = Fraction(ceil(Fraction(stored, self._whole) * FRACTION_STEPS), FRACTION_STEPS)
        if least > 1:
            return f"less to store: no {self.option} is enough{taken}"
        return f"a {self.option} of at least {float(least):.4f}{taken}"

    @property
    def _whole(self) -> int:
        return self.targets if self.option == "keep_ratio" else self.total
