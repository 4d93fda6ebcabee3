"""Weights of few bits out of packed words: the format that compressed-tensors writes since version 0.20.

Engines bring older versions of that library, which read widths that do not divide a word in another way.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from slimrank.layers.quantized import PACKED, SCALE, ZERO
from slimrank.linalg.scheme import WORD_BITS, Scheme

_ROWS_AT_ONCE = 1024  # each number takes 8 bytes while it is unpacked


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """Return integers (rows x columns, int8) out of words (rows x words, int32), which hold them without gaps.

    Args:
        words: number i of a row begins at bit i * bits, and may go on in the next word.
        bits: of an integer.
        columns: integers of a row.
    """
    return torch.cat([_unpack(some, bits, columns) for some in words.split(_ROWS_AT_ONCE)])


def _unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    unsigned = words.long() & ((1 << WORD_BITS) - 1)
    unsigned = torch.nn.functional.pad(unsigned, (0, 1))  # the last number has a next word, too
    start = torch.arange(columns, device=words.device) * bits
    word, offset = start // WORD_BITS, start % WORD_BITS
    both = (unsigned[:, word] >> offset) | (unsigned[:, word + 1] << (WORD_BITS - offset))
    return ((both & ((1 << bits) - 1)) - (1 << (bits - 1))).to(torch.int8)


def dequantized(values: Mapping[str, Tensor], scheme: Scheme, columns: int) -> Tensor:
    """Return the weight (rows x columns) that packed tensors stand for, in the dtype of the scales.

    Args:
        values: by name, without the path of the layer.
        scheme: of the integers.
        columns: of the weight.
    """
    scale = values[SCALE]
    codes = unpack(values[PACKED], scheme.bits, columns).to(scale.dtype)
    each = scheme.columns(columns)
    if ZERO in values:
        zero = unpack(values[ZERO].t(), scheme.bits, len(scale)).t()
        codes -= zero.to(scale.dtype).repeat_interleave(each, 1)
    return codes * scale.repeat_interleave(each, 1)
