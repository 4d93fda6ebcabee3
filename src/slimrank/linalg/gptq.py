"""Round a weight so that its outputs change little, not its numbers.

    min over q of || (W - W_q) R ||_F ,   gram = R R^T

GPTQ (arXiv 2210.17323) rounds column by column; the columns that are left compensate each error. Columns of large
energy come first (its "act-order", with scales fixed beforehand, so that nothing is stored in another order). Then each
number in turn is moved to its best place, given all others (QuantEase, arXiv 2309.01885), and each scale is fitted to
the integers in closed form. Neither step raises the error.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from slimrank.linalg.rounding import Grid, Rounded, grid_of
from slimrank.linalg.scheme import Scheme

DAMPING = 0.01  # of the mean energy of a column, added to each
BLOCK = 128  # columns that are rounded before the others hear of it
SWEEPS = 2  # rounds of moving every number and fitting every scale


def gptq(weight: Tensor, gram: Tensor, scheme: Scheme, dtype: torch.dtype, sweeps: int = SWEEPS) -> Rounded:
    """Round a weight in the metric of its inputs.

    Args:
        weight: W (m x n).
        gram: sum of x x^T (n x n), float64, on the device that computes.
        scheme: integers and groups.
        dtype: what scales are stored in.
        sweeps: rounds of improvement after GPTQ itself.

    Raises:
        ValueError: n is not a number of whole groups.
    """
    metric = damped(gram)
    w = weight.to(metric)
    found = _compensated(w, metric, grid_of(w, scheme, dtype, metric.diagonal()))
    for _ in range(sweeps):
        found = fit_scales(w, metric, Rounded(_moved(w, metric, found), found.grid))
    return found


def damped(gram: Tensor) -> Tensor:
    """Return the gram with a little of its mean energy on the diagonal; the identity for a gram that is zero."""
    mean = float(gram.diagonal().mean())
    if not mean > 0:
        return torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    metric = gram.clone()
    metric.diagonal().add_(DAMPING * mean)
    return metric


def error(weight: Tensor, rounded: Tensor, metric: Tensor) -> Tensor:
    """Return the squared error of each row (m) in a metric (n x n)."""
    lost = weight - rounded
    return (lost @ metric).mul_(lost).sum(-1)


def _compensated(weight: Tensor, metric: Tensor, grid: Grid) -> Rounded:
    """Round column by column; columns that are left take up each error, by the Cholesky factor of metric^-1."""
    order = metric.diagonal().argsort(descending=True)
    sorted_metric = metric[order][:, order]
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(sorted_metric)), upper=True)
    columns = grid.by_column(weight.shape[1])
    left, codes = weight.t()[order].contiguous(), torch.empty_like(columns.scale)
    for now in _blocks(len(order)):
        errors = torch.empty_like(left[now])
        for j in range(now.start, now.stop):
            column = int(order[j])
            codes[column] = columns.codes(left[j], column)
            errors[j - now.start] = lost = (left[j] - columns.values(codes[column], column)) / upper[j, j]
            left[j : now.stop].addr_(upper[j, j : now.stop], lost, alpha=-1)
        left[now.stop :].addmm_(upper[now, now.stop :].t(), errors, alpha=-1)
    return Rounded(codes.t(), grid)


def _moved(weight: Tensor, metric: Tensor, rounded: Rounded) -> Tensor:
    """Return codes after moving every number once to its best place, given all others."""
    columns, codes = rounded.grid.by_column(weight.shape[1]), rounded.codes.t().contiguous()
    pull = metric @ (weight - rounded.values()).t()
    for now in _blocks(len(metric)):
        mine, changes = pull[now].clone(), torch.empty_like(pull[now])
        for j in range(now.start, now.stop):
            old = columns.values(codes[j], j)
            codes[j] = columns.codes(old + mine[j - now.start] / metric[j, j], j)
            changes[j - now.start] = change = columns.values(codes[j], j) - old
            mine.addr_(metric[j, now], change, alpha=-1)
        pull.addmm_(metric[:, now], changes, alpha=-1)
    return codes.t()


def _blocks(columns: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, columns)) for start in range(0, columns, BLOCK)]


def fit_scales(weight: Tensor, metric: Tensor, rounded: Rounded) -> Rounded:
    """Return the same integers with the best scales, by least squares for each row; a row that loses stays as it is."""
    grid, (rows, groups) = rounded.grid, rounded.grid.scale.shape
    parts = rounded.codes.reshape(rows, groups, -1) - grid.zero[..., None]
    normal = _between_groups(parts, metric)
    normal.diagonal(dim1=1, dim2=2).add_(torch.finfo(torch.float32).eps * normal.diagonal(dim1=1, dim2=2) + 1e-30)
    wanted = ((weight @ metric).reshape(rows, groups, -1) * parts).sum(-1)
    scale = torch.linalg.solve(normal, wanted[..., None])[..., 0].to(grid.dtype).to(weight)
    scale = torch.where((scale > 0) & scale.isfinite(), scale, grid.scale)
    new = Rounded(rounded.codes, replace(grid, scale=scale))
    lower = error(weight, new.values(), metric) < error(weight, rounded.values(), metric)
    return Rounded(rounded.codes, replace(grid, scale=torch.where(lower[:, None], scale, grid.scale)))


def _between_groups(parts: Tensor, metric: Tensor) -> Tensor:
    """Return c_a^T H c_b for the integers c of groups a and b of each row: rows x groups x groups."""
    rows, groups, width = parts.shape
    found = parts.new_empty(rows, groups, groups)
    for a in range(groups):
        beside = parts[:, a] @ metric[a * width : (a + 1) * width]
        found[:, a] = (beside.reshape(rows, groups, width) * parts).sum(-1)
    return found
