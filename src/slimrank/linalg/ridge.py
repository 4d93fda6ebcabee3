"""How far to trust a least-squares correction of a weight: the ridge by cross-validation, from sums over tokens.

Least squares corrects W by D = C (X X^T + lambda I)^-1, C = (T - W X) X^T: what W X lacks, regressed on X. Fitted on
one half of the tokens (a) and tested on the other (b), it changes the squared error there by

    tr(D^T G D X_b X_b^T) - 2 tr(D^T G C_b)

In the eigenbasis of X_a X_a^T = Q diag(v) Q^T, with d_i = 1 / (v_i + lambda), that is d^T M d - 2 k^T d for

    M = (Q^T C_a^T G C_a Q) o (Q^T X_b X_b^T Q),    k_i = (Q^T C_a^T G C_b Q)_ii

so that one eigen-decomposition gives the error for every lambda.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimrank.linalg.eigen import descending_eigen
from slimrank.linalg.regression import Regression

RIDGES = tuple(10 ** (i / 4) for i in range(-16, 13))  # in units of the mean input energy


def cross_validated(halves: tuple[Regression, Regression], weight: Tensor) -> float:
    """The ridge that serves either half best when fitted on the other, in units of the mean input energy of both.

    Args:
        halves: the same problem by the sums of two disjoint sets of tokens.
        weight: W (m x n), which a ridge pulls towards.
    """
    first, second = halves
    ridges = torch.tensor(RIDGES, dtype=torch.float64) * float((first.gram + second.gram).diagonal().mean())
    changes = _changes(first, second, weight, ridges) + _changes(second, first, weight, ridges)
    return RIDGES[int(changes.argmin())]


def _changes(fitted: Regression, tested: Regression, weight: Tensor, ridges: Tensor) -> Tensor:
    """Change of the squared error on `tested` tokens by corrections fitted on others, for each ridge (absolute)."""
    values, vectors, _ = descending_eigen(fitted.gram)
    own, between = fitted.lacking(fitted, weight), fitted.lacking(tested, weight)
    bilinear = vectors.t() @ own @ vectors * (vectors.t() @ tested.gram @ vectors)
    linear = ((vectors.t() @ between) * vectors.t()).sum(dim=1)
    d = 1 / (values.clamp(min=0)[None, :] + ridges.to(values)[:, None])
    return (d @ bilinear * d).sum(dim=1) - 2 * d @ linear
