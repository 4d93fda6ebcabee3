"""Packed integers are read as compressed-tensors writes them, whichever version of it an engine has."""

import pytest
import torch

from slimrank.layers.quantized import PackedLinear
from slimrank.linalg.rounding import nearest
from slimrank.linalg.scheme import Scheme
from slimrank.serving.packing import dequantized, unpack


def packed_by_hand(codes, bits):
    """Numbers as one row of bits, the lowest bit first, without gaps."""
    rows = []
    for row in (codes.long() + (1 << (bits - 1))).tolist():
        stream = sum(code << (place * bits) for place, code in enumerate(row))
        words = [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(-(-len(row) * bits // 32))]
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 31, 32, 77])
def test_every_width_is_unpacked(bits, columns):
    draw = torch.Generator().manual_seed(bits)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (1030, columns), generator=draw).to(torch.int8)
    assert torch.equal(unpack(packed_by_hand(codes, bits), bits, columns), codes)


@pytest.mark.parametrize("scheme", ["int8", "int4-g32", "int3-g16", "int6-g32-sym", "int5"])
def test_weights_are_those_that_the_saved_layer_holds(scheme):
    pytest.importorskip("compressed_tensors", "0.20")
    from slimrank.layers.quantized import QuantizedLinear

    scheme = Scheme.parse(scheme)
    found = nearest(torch.randn(40, 64, dtype=torch.float64), scheme, torch.float32)
    zero = None if scheme.symmetric else found.grid.zero.to(torch.int8)
    layer = QuantizedLinear.holding(scheme, found.values().float(), found.grid.scale.float(), zero)
    loaded = PackedLinear(torch.nn.Linear(64, 40, bias=False), scheme)
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(dequantized(layer.state_dict(), scheme, 64), loaded.unpacked().weight)
