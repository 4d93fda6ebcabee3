"""Schemes of integers: how they are written, and what they take on disk."""

import pytest
import torch

from slimrank.linalg.scheme import Scheme


@pytest.mark.parametrize("text", ["int8", "int4-g64", "int3-g32-sym", "int2-sym"])
def test_a_scheme_is_written_as_it_is_read(text):
    assert str(Scheme.parse(text)) == text


def test_a_scheme_says_what_it_is():
    assert Scheme.parse("int4-g64-sym") == Scheme(4, 64, True)
    assert Scheme.parse("int4").codes == (-8, 7)
    assert Scheme(3).columns(48) == 48
    assert Scheme(3, 16).columns(48) == 16
    assert Scheme(3, 16).divides(48)
    assert not Scheme(3, 32).divides(48)


@pytest.mark.parametrize("text", ["int1", "int9", "int4-g0", "int4-64", "4", "int4-g64-asym", "nf4", ""])
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match=r"2 to 8 bits|at least one column|is not a scheme"):
        Scheme.parse(text)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("rows, columns, group", [(5, 48, 16), (64, 64, None), (7, 9, 3), (0, 8, 4), (4, 0, 4)])
def test_the_bits_on_disk_are_those_of_packed_tensors(bits, rows, columns, group):
    packing = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    for symmetric in (True, False):
        scheme = Scheme(bits, group, symmetric)
        groups = columns // scheme.columns(columns) if columns else 0
        tensors = [torch.zeros(rows, groups, dtype=torch.float16)] if rows and columns else []
        if rows and columns:
            tensors.append(packing.pack_to_int32(torch.zeros(rows, columns, dtype=torch.int8), bits))
            if not symmetric:
                zero = torch.zeros(rows, groups, dtype=torch.int8)
                tensors.append(packing.pack_to_int32(zero, bits, packed_dim=0))
        held = sum(8 * tensor.numel() * tensor.element_size() for tensor in tensors)
        assert scheme.stored_bits(rows, columns, 16) == held
