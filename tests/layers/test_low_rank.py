import copy

import pytest
import torch

from slimrank.layers import LowRankLinear


@pytest.mark.parametrize("bias", [True, False])
def test_equals_its_dense_form(bias):
    layer = LowRankLinear(6, 5, 3, bias=bias, dtype=torch.float64)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(layer.to_dense()(x), layer(x))
    torch.testing.assert_close(layer.weight, layer.B.weight @ layer.A.weight)
    assert (layer.bias is not None) == bias


def test_state_dict_holds_the_factors_and_nothing_else():
    layer = LowRankLinear(6, 5, 3, bias=True)
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == {
        "A.weight": (3, 6), "B.weight": (5, 3), "B.bias": (5,),
    }  # fmt: skip


def test_from_factors_holds_the_tensors_themselves():
    g = torch.Generator().manual_seed(0)
    a, b, bias = (torch.randn(shape, generator=g) for shape in ((3, 6), (5, 3), (5,)))
    layer = LowRankLinear.from_factors(a, b, bias)
    assert layer.A.weight.data_ptr() == a.data_ptr()
    torch.testing.assert_close(layer(torch.eye(6)), (b @ a).T + bias)
    assert "rank=3" in repr(layer)
    copy.deepcopy(layer)


def test_rank_zero_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        LowRankLinear(4, 4, 0)


def test_dtype_follows():
    layer = LowRankLinear(6, 5, 3, dtype=torch.bfloat16)
    assert layer(torch.ones(1, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
