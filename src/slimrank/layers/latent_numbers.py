"""How the latents of a cache are stored. Copied into saved models; imports nothing but torch."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127  # of int8, on both sides of zero
SCALE = torch.float16
SCALE_BYTES = 2
LEAST = 2.0**-24  # the least number above zero in float16


class AsTheyAre:
    """Latents in the dtype in which the model computes them."""

    name = "latent"

    def stored(self, z: Tensor) -> Tensor:
        """Return what is kept of latents (..., rank)."""
        return z

    def read(self, kept: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the latents that `stored` kept."""
        return kept

    def bytes(self, rank: int, itemsize: int) -> int:
        """Count the bytes of one latent, in a model of numbers of `itemsize` bytes."""
        return rank * itemsize


class Int8:
    """Latents as integers of 8 bits, symmetric, with a scale in float16 for each token.

    Integers and scale lie in one tensor (..., rank + 2), so that all that is done to a cache is done to both.
    """

    name = "latent-int8"

    def stored(self, z: Tensor) -> Tensor:
        """See `AsTheyAre.stored`."""
        scale = (z.detach().abs().amax(-1, keepdim=True).float() / LARGEST).clamp_min(LEAST).to(SCALE)
        codes = (z.detach().float() / scale.float()).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
        return torch.cat([codes, scale.view(torch.int8)], -1)

    def read(self, kept: Tensor, dtype: torch.dtype) -> Tensor:
        """See `AsTheyAre.read`."""
        codes, scale = kept.split([kept.shape[-1] - SCALE_BYTES, SCALE_BYTES], -1)
        return (codes.float() * scale.contiguous().view(SCALE).float()).to(dtype)

    def bytes(self, rank: int, itemsize: int) -> int:
        """See `AsTheyAre.bytes`."""
        return rank + SCALE_BYTES


def numbers_of(int8: bool) -> AsTheyAre | Int8:
    """Return how latents are stored."""
    return Int8() if int8 else AsTheyAre()
