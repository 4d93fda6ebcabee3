"""Eigen-decompositions and roots of positive semidefinite matrices, with a ladder for failures."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor


def descending_eigen(matrix: Tensor) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Eigenvalues (largest first), eigenvectors as columns, and notes on anything unusual.

    A solver that does not converge is tried again on the CPU, then with a relative jitter of 1e-12; both are
    noted, never silent.

    Raises:
        torch.linalg.LinAlgError: when the last rung fails too.
    """
    with suppress(torch.linalg.LinAlgError):
        return *_flip(*torch.linalg.eigh(matrix)), ()
    host = matrix.cpu()
    try:
        values, vectors = torch.linalg.eigh(host)
        note = "eigen-solver failed on the device; solved on the CPU"
    except torch.linalg.LinAlgError:
        jitter = 1e-12 * host.diagonal().mean()
        values, vectors = torch.linalg.eigh(host + jitter * torch.eye(len(host), dtype=host.dtype))
        note = "eigen-solver failed; solved after a relative jitter of 1e-12"
    return *_flip(values.to(matrix.device), vectors.to(matrix.device)), (note,)


def _flip(values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    return values.flip(0), vectors.flip(1)


def psd_root(c: Tensor) -> tuple[Tensor, tuple[str, ...]]:
    """A square root R of a positive semidefinite c (n x n, float64), c = R R^T, and notes.

    Cholesky where c is numerically positive definite; otherwise Q diag(lambda)^(1/2) with eigenvalues below
    eps n lambda_max raised to that floor. c is never shifted by its smallest eigenvalue: one massive
    activation makes that shift thousands of times larger than the true smallest eigenvalue.
    """
    factor, info = torch.linalg.cholesky_ex(c)
    if int(info) == 0:
        return factor, ()
    values, vectors, notes = descending_eigen(c)
    floor = torch.finfo(c.dtype).eps * len(c) * values[0].clamp(min=torch.finfo(c.dtype).tiny)
    clamped = int((values < floor).sum())
    root = vectors * values.clamp(min=floor).sqrt()
    return root, (*notes, f"gram is rank-deficient: {clamped} of {len(c)} eigenvalues raised to the floor")


def canonical_signs(u: Tensor) -> Tensor:
    """Columns flipped so that the entry of largest magnitude of each is positive."""
    largest = u.gather(0, u.abs().argmax(dim=0, keepdim=True))
    return u * torch.where(largest < 0, -1.0, 1.0).to(u.dtype)
