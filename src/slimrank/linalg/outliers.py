"""Test whether a sum of float32 products still holds its small spectrum.

A product of float32 numbers errs by some 1e-7 of its largest terms. A direction thousands of times larger than the
others hides them: its rounding is as large as they are. A large channel does not, since rounding follows each entry.
So the test uses the correlation matrix, in which all channels count alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

DIRECTIONS = 8  # that may be outliers at once
LEAST_BESIDE = 1e-2  # of the energy: below it, the rounding of the rest is some 1e-4 of it and more
ITERATIONS = 2


def hides_small_spectrum(gram: Tensor) -> bool:
    """Tell whether a few directions of a gram (n x n) hold more than 99 % of its energy, channels scaled alike.

    The leading directions come from two rounds of subspace iteration, which costs a hundredth of the gram itself.
    """
    energies = gram.diagonal()
    scale = torch.where(energies > 0, energies.clamp(min=torch.finfo(gram.dtype).tiny).rsqrt(), 0)
    alive = int((scale > 0).sum())
    if alive <= DIRECTIONS:
        return alive > 1  # so small a product costs nothing in float64
    scale = scale[:, None]
    draw = torch.Generator().manual_seed(0)
    basis = torch.randn(len(gram), DIRECTIONS, generator=draw).to(gram)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(scale * (gram @ (scale * basis))).Q
    basis = scale * basis
    held = float((basis * (gram @ basis)).sum())
    return 1 - held / alive < LEAST_BESIDE
