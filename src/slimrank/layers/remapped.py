"""Pairs of factors in 8 bits and 16: Dobi-SVD's remapping. Copied into saved models; imports nothing but torch."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from slimrank.layers.base import CompressedLinear, numbers
from slimrank.layers.layer_form import LayerForm

CODE_BITS, LARGEST_CODE = 8, 127


class RemappedLinear(CompressedLinear):
    """y = B (A x) + bias; the first k = min(m, n) numbers of every row of A and column of B are integers of 8 bits.

    Each of these vectors has a scale. `rest` holds the numbers of the longer factor that are left: the last rows of B
    (m > n) or columns of A (m < n), as wide as scales are. All rank (m + n) numbers together take about as many bits
    as rank max(m, n) of 16 bits: Dobi-SVD (arXiv 2502.02723), "remapping". `place` is `device` and `dtype`.

    Attributes:
        a_codes: rank x k, int8.
        b_codes: k x rank, int8.
        scales: 2 x rank: of the rows of A, and of the columns of B.
        rest: None where m = n.
    """

    kind: ClassVar[str] = "remapped"
    a_codes: Tensor
    b_codes: Tensor
    rest: Tensor | None

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False, **place: Any) -> None:
        short = min(in_features, out_features)
        if not 1 <= rank <= short:
            raise ValueError(f"rank must be 1 to {short}, got {rank}")
        super().__init__(in_features, out_features, rank)
        integers: dict[str, Any] = {"dtype": torch.int8, "device": place.get("device")}
        self.register_buffer("a_codes", torch.zeros(rank, short, **integers))
        self.register_buffer("b_codes", torch.zeros(short, rank, **integers))
        self.scales = nn.Parameter(torch.ones(2, rank, **place))
        beyond = (out_features - short, rank) if out_features > short else (rank, in_features - short)
        rest = nn.Parameter(torch.zeros(beyond, **place)) if in_features != out_features else None
        self.register_parameter("rest", rest)
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features, **place)) if bias else None)

    @property
    def _tall(self) -> bool:
        """Tell whether the rest belongs to B."""
        return self.out_features > self.in_features

    def _a(self, scales: Tensor, rest: Tensor | None) -> Tensor:
        head = self.a_codes.to(scales.dtype) * scales[0][:, None]
        return head if rest is None or self._tall else torch.cat([head, rest], 1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., in) to (..., out)."""
        latent = self.latent(x)  # times B's scales here: OpenVINO 2026.4 misreads scales of a weight's columns
        y = linear(latent * self.scales[1], self.b_codes.to(latent.dtype))
        if self.rest is not None and self._tall:
            y = torch.cat([y, linear(latent, self.rest)], -1)
        return y if self.bias is None else y + self.bias

    def latent(self, x: Tensor) -> Tensor:
        """Return A x (..., rank)."""
        return linear(x, self._a(self.scales, self.rest))

    def factors(self) -> tuple[Tensor, Tensor]:
        """See `CompressedLinear.factors`."""
        scales, rest = numbers(self.scales), None if self.rest is None else numbers(self.rest)
        head = self.b_codes.double() * scales[1]
        return self._a(scales, rest), head if rest is None or not self._tall else torch.cat([head, rest])

    def set_b(self, B: Tensor) -> None:
        """Round B (m x rank) to what is stored of it; A stays."""
        short = self.b_codes.shape[0]
        self.b_codes, scale = self._rounded(B[:short], 0)
        self._set_scale(1, scale)
        if self.rest is not None and self._tall:
            self.rest.data = B[short:].to(self.rest)

    def set_a(self, A: Tensor) -> None:
        """Round A (rank x n) to what is stored of it; B stays."""
        short = self.a_codes.shape[1]
        self.a_codes, scale = self._rounded(A[:, :short], 1)
        self._set_scale(0, scale)
        if self.rest is not None and not self._tall:
            self.rest.data = A[:, short:].to(self.rest)

    def _rounded(self, part: Tensor, along: int) -> tuple[Tensor, Tensor]:
        """Return the integers of a matrix whose vectors lie along an axis, and their scales in the stored dtype.

        The largest number of a vector gets the largest integer.
        """
        scale = (part.abs().amax(along) / LARGEST_CODE).to(self.scales)
        codes = (part / scale.to(part).unsqueeze(along)).nan_to_num()  # a vector of zeros has the scale 0
        return codes.round().clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.int8).contiguous(), scale

    def _set_scale(self, row: int, scale: Tensor) -> None:
        self.scales.data = torch.stack([scale if row == each else self.scales.data[each] for each in range(2)])


class RemappedForm(LayerForm):
    """Rank (m + n) numbers: 2 rank min(m, n) of 8 bits, the others and two scales for each component as wide as W's."""

    name: ClassVar[str] = "remapped"

    def stored(self, m: int, n: int, rank: int) -> int:
        """See `LayerForm.stored`."""
        return rank * (m + n + 2)

    def stored_bits(self, m: int, n: int, rank: int, width: int) -> int:
        """See `LayerForm.stored_bits`."""
        return rank * (2 * CODE_BITS * min(m, n) + (abs(m - n) + 2) * width)

    def more_tensors(self, places: int) -> int:
        """See `LayerForm.more_tensors`: integers are stored for every place, scales and the rest once."""
        return 1 + 2 * places

    def build(self, A: Tensor, B: Tensor, bias: Tensor | None, dtype: torch.dtype) -> RemappedLinear:
        """See `LayerForm.build`: the product's singular vectors are rounded, each by itself.

        Raises:
            ValueError: a rank above min(m, n).
        """
        layer = RemappedLinear(A.shape[1], B.shape[0], A.shape[0], device=A.device, dtype=dtype)
        a, b = _components(A, B)
        layer.set_a(a)
        layer.set_b(b)
        layer.set_bias(None if bias is None else bias.to(dtype))
        return layer


def _components(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the same product whose rows and columns are its singular vectors times sqrt(s)."""
    qb, rb = torch.linalg.qr(B)
    qa, ra = torch.linalg.qr(A.t())
    u, s, v = torch.linalg.svd(rb @ ra.t())
    return (s.sqrt()[:, None] * v) @ qa.t(), (qb @ u) * s.sqrt()
