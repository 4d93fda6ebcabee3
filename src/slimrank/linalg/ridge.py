"""How far to trust a least-squares correction of a weight: the ridge by cross-validation, from sums over tokens.

Inputs are first divided by the root of the unit of ridges, so that this unit is the identity.
Least squares corrects W by D = C (X X^T + lambda I)^-1, C = (T - W X) X^T: the residual of W X, regressed on X. Fitted
on one half of the tokens (a) and tested on the other (b), it changes the squared error there by

    tr(D^T G D X_b X_b^T) - 2 tr(D^T G C_b)

In the eigenbasis of X_a X_a^T = Q diag(v) Q^T, with d_i = 1 / (v_i + lambda), that is d^T M d - 2 k^T d for

    M = (Q^T C_a^T G C_a Q) o (Q^T X_b X_b^T Q),    k_i = (Q^T C_a^T G C_b Q)_ii

so that one eigen-decomposition gives the error for every lambda.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from slimrank.linalg.eigen import descending_eigen
from slimrank.linalg.forms import Towards
from slimrank.linalg.regression import Regression

RIDGES = tuple(10 ** (i / 4) for i in range(-16, 13))  # in units of the energy of a channel, or of all on average


def cross_validated(halves: tuple[Regression, Regression], weight: Tensor, unit: Towards = "diagonal") -> float:
    """Choose the ridge that serves either half best when fitted on the other, in units of the energy of both.

    Args:
        halves: the same problem by the sums of two disjoint sets of tokens.
        weight: W (m x n), which a ridge pulls towards.
        unit: of ridges, see `Regression.ridge_unit`.
    """
    first, second = halves
    both = replace(first, gram=first.gram + second.gram)
    scale = both.ridge_unit(unit).clamp(min=torch.finfo(torch.float64).tiny).rsqrt()
    changes = _changes(first, second, weight, scale) + _changes(second, first, weight, scale)
    return RIDGES[int(changes.argmin())]


def _changes(fitted: Regression, tested: Regression, weight: Tensor, scale: Tensor) -> Tensor:
    """Return the change of the squared error on `tested` tokens by corrections fitted on others, for each ridge.

    Inputs count `scale` (n) times.
    """
    weighed = torch.outer(scale, scale)
    values, vectors, _ = descending_eigen(fitted.gram * weighed)
    own, between = fitted.lacking(fitted, weight) * weighed, fitted.lacking(tested, weight) * weighed
    bilinear = vectors.t() @ own @ vectors * (vectors.t() @ (tested.gram * weighed) @ vectors)
    linear = ((vectors.t() @ between) * vectors.t()).sum(dim=1)
    d = 1 / (values.clamp(min=0)[None, :] + torch.tensor(RIDGES).to(values)[:, None])
    return (d @ bilinear * d).sum(dim=1) - 2 * d @ linear
