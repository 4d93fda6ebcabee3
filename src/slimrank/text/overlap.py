"""Find evaluation windows in the calibration text, whatever the files are called."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

RUN_TOKENS = 32  # equal tokens in a row that are more than chance
SHORTEST_RUN = 16  # shorter windows are not compared
_FACTOR = 0x5851F42D4C957F2D
_AT_ONCE = 2**20


def windows_found(windows: Tensor, tokens: Tensor) -> Tensor:
    """Tell which windows are found in a text, at least for half of their length.

    Args:
        windows: windows x length, without BOS.
        tokens: one text (1-D), or other windows (2-D).

    Returns:
        A bool for each window. Windows of fewer than `SHORTEST_RUN` tokens are never found.
    """
    run = min(RUN_TOKENS, windows.shape[1])
    if run < SHORTEST_RUN or tokens.shape[-1] < run:
        return torch.zeros(len(windows), dtype=torch.bool)
    wanted = _hashes(windows, run)[:, ::run]
    found = torch.zeros_like(wanted, dtype=torch.bool)
    for part in _parts(tokens, run):
        found |= torch.isin(wanted, _hashes(part, run))
    return found.double().mean(dim=1) >= 0.5


def _parts(tokens: Tensor, run: int) -> Iterator[Tensor]:
    """Split a long text into parts that share `run - 1` tokens, so that memory stays small."""
    if tokens.dim() > 1:
        yield from tokens.split(max(1, _AT_ONCE // tokens.shape[1]))
        return
    for start in range(0, len(tokens) - run + 1, _AT_ONCE):
        yield tokens[start : start + _AT_ONCE + run - 1]


def _hashes(tokens: Tensor, run: int) -> Tensor:
    """Hash every `run` tokens in a row, along the last dimension; 64-bit integers that wrap around."""
    length = tokens.shape[-1] - run + 1
    total = torch.zeros_like(tokens[..., :length])
    for offset in range(run):
        total = total * _FACTOR + tokens[..., offset : offset + length] + 1
    return total
