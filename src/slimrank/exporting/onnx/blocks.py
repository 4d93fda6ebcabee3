"""Integers with a scale for each block of columns, as the operation MatMulNBits of ONNX Runtime reads them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slimrank.layers.quantized import QuantizedLinear

BLOCK = 32  # columns that share a scale
SIZES = (256, 128, 64, 32, 16)  # of blocks that ONNX Runtime has
NARROW, WIDE = 4, 8


@dataclass(frozen=True)
class Blocks:
    """A weight of few bits: (code - zero) * scale.

    Attributes:
        bits: 4 or 8.
        columns: of the weight; the last block may be longer than they are.
        codes: rows x blocks x columns of a block, from 0 on.
        scales: rows x blocks.
        zeros: rows x blocks; None where all are half of the largest code.
    """

    bits: int
    columns: int
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None

    @property
    def half(self) -> int:
        """The code of 0 where there are no zero points."""
        return 1 << (self.bits - 1)

    @property
    def block(self) -> int:
        """Columns that share a scale."""
        return int(self.codes.shape[-1])

    def numbers(self) -> np.ndarray:
        """Return the weight."""
        zeros = self.half if self.zeros is None else self.zeros[..., None].astype(np.float32)
        found = (self.codes.astype(np.float32) - zeros) * self.scales[..., None]
        return np.asarray(found.reshape(len(found), -1)[:, : self.columns])

    def packed(self) -> np.ndarray:
        """Return the codes as they are stored."""
        return _packed(self.codes, self.bits)

    def packed_zeros(self) -> np.ndarray | None:
        """Return the zero points as they are stored."""
        return None if self.zeros is None else _packed(self.zeros, self.bits)


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Store two codes of 4 bits in a byte, the first one low."""
    if bits == WIDE:
        return codes
    whole = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)])
    return whole[..., ::2] | (whole[..., 1::2] << 4)


def rounded(weight: np.ndarray, bits: int) -> Blocks:
    """Round a weight (rows x columns) to the nearest: the largest number of each block is the lowest code or -1 of it.

    Args:
        weight: of float32.
        bits: 4 or 8.
    """
    half = 1 << (bits - 1)
    blocks = _in_blocks(weight, BLOCK, 0)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    scales = largest / -half
    whole = np.rint(np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales != 0))
    codes = (np.clip(whole, -half, half - 1) + half).astype(np.uint8)
    return Blocks(bits, weight.shape[1], codes, scales[..., 0])


def own_blocks(layer: QuantizedLinear) -> Blocks | None:
    """Return the integers of one of slimrank's layers; None if ONNX Runtime has no blocks for its groups.

    Up to 4 bits take 4, more take 8. A group may be several blocks.
    """
    scheme, columns = layer.scheme, layer.in_features
    together = scheme.columns(columns)
    block = BLOCK if together == columns else next((size for size in SIZES if together % size == 0), None)
    if block is None:
        return None
    bits = NARROW if scheme.bits <= NARROW else WIDE
    half = 1 << (bits - 1)
    codes = _in_blocks((layer.codes().cpu().numpy().astype(np.int16) + half).astype(np.uint8), block, half)
    repeats = codes.shape[1] // layer.weight_scale.shape[1]
    scales = layer.weight_scale.detach().float().cpu().numpy().repeat(repeats, 1)
    zero = layer.weight_zero_point
    zeros = None if zero is None else (zero.cpu().numpy().astype(np.int16) + half).astype(np.uint8).repeat(repeats, 1)
    return Blocks(bits, columns, codes, scales, zeros)


def _in_blocks(rows: np.ndarray, block: int, fill: int) -> np.ndarray:
    missing = -rows.shape[1] % block
    whole = np.pad(rows, ((0, 0), (0, missing)), constant_values=fill)
    return whole.reshape(len(rows), -1, block)
