import copy

import pytest
import torch

from slimrank.layers import LowRankLinear, PivotLinear
from slimrank.layers.forms import PAIR, PIVOT, layer_form, pivot_layer
from slimrank.linalg.regression import Regression, best_b

SHAPES = [(10, 14, 4), (14, 10, 4), (9, 9, 1), (8, 12, 8), (12, 8, 8)]
SIDES = ["out", "in"]


def factors(m, n, r, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in ((r, n), (m, r), (m,)))


def inputs(n, dtype=torch.float64):
    return torch.randn(2, 5, n, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("m, n, r", SHAPES)
def test_computes_what_the_pair_computes(m, n, r, side, biased):
    a, b, bias = factors(m, n, r)
    bias = bias if biased else None
    layer = pivot_layer(a, b, bias, side, dtype=torch.float64)
    x = inputs(n)
    expected = LowRankLinear.from_factors(a, b, bias)(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(layer.to_dense()(x), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(layer.weight, b @ a, rtol=1e-11, atol=1e-11)
    assert (layer.bias is not None) == biased
    assert sum(p.numel() for p in layer.parameters()) == PIVOT.parameters(m, n, r) + biased * m
    assert (layer.in_features, layer.out_features, layer.rank, layer.side) == (n, m, r, side)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("m, n, r", SHAPES)
def test_many_tokens_get_what_each_gets_alone(m, n, r, side):
    layer = pivot_layer(*factors(m, n, r), side, dtype=torch.float64)
    x = inputs(n).requires_grad_()
    alone = torch.stack([layer(token) for token in x.flatten(0, 1)]).reshape(2, 5, m)
    torch.testing.assert_close(layer(x), alone, rtol=1e-11, atol=1e-11)
    wanted = torch.randn(2, 5, m, dtype=torch.float64)
    found = [torch.autograd.grad(y, [x, *layer.parameters()], wanted) for y in (layer(x), alone)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    assert layer(x[:0]).shape == (0, 5, m)
    assert layer(x).is_contiguous()


@pytest.mark.parametrize("side", SIDES)
def test_a_hook_of_a_part_sees_every_call(side):
    layer = pivot_layer(*factors(9, 9, 3), side, dtype=torch.float64)
    wanted, seen = layer(inputs(9)), []
    for part in (layer.skeleton, layer.interpolation):
        part.register_forward_hook(lambda part, args, output: seen.append(part))
    torch.testing.assert_close(layer(inputs(9)), wanted, rtol=1e-11, atol=1e-11)
    assert len(seen) == 2


@pytest.mark.parametrize("side", SIDES)
def test_autocast_gives_the_dtype_that_a_call_of_the_parts_gives(side):
    layer = pivot_layer(*factors(9, 9, 3), side, dtype=torch.float32)
    x = inputs(9, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        many, alone = layer(x), layer(x[0, 0])
    assert many.dtype == alone.dtype


def test_the_side_with_fewer_places_is_the_default():
    for m, n, side in ((10, 14, "out"), (14, 10, "in"), (9, 9, "out")):
        a, b, _ = factors(m, n, 3)
        layer = pivot_layer(a, b, dtype=torch.float32)
        assert layer.side == side
        assert layer.order.numel() == min(m, n)


@pytest.mark.parametrize("side", SIDES)
def test_state_dict_holds_the_parts_and_nothing_else(side):
    layer = PivotLinear(6, 5, 3, bias=True, side=side)
    expected = {
        "out": {"skeleton.weight": (3, 6), "interpolation.weight": (2, 3), "order": (5,), "bias": (5,)},
        "in": {"skeleton.weight": (5, 3), "interpolation.weight": (3, 3), "order": (6,), "bias": (5,)},
    }[side]
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == expected
    assert layer.order.dtype == torch.int32
    assert f"rank=3, side={side}" in repr(layer)


@pytest.mark.parametrize("side", SIDES)
def test_state_dict_round_trip(side):
    layer = pivot_layer(*factors(10, 14, 4), side, dtype=torch.float32)
    other = PivotLinear(14, 10, 4, bias=True, side=side)
    other.load_state_dict(layer.state_dict())
    x = inputs(14, torch.float32)
    assert torch.equal(other(x), layer(x))
    empty = PivotLinear(14, 10, 4, bias=True, side=side, device="meta", dtype=torch.bfloat16)
    assert {t.device.type for t in empty.state_dict().values()} == {"meta"}
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty(x), layer(x))
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x), layer(x))
    assert copied.order.data_ptr() != layer.order.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", SIDES)
def test_moving_to_16_bits_leaves_the_order(side, dtype):
    layer = pivot_layer(*factors(64, 48, 20, dtype=torch.float32), side, dtype=torch.float32)
    x = inputs(48, torch.float32)
    wide = layer(x).detach()
    half = layer.to(dtype)
    assert half.order.dtype == torch.int32
    y = half(x.to(dtype)).detach()
    assert y.dtype == dtype
    assert float((y.float() - wide).norm() / wide.norm()) < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("side", SIDES)
def test_gradients_reach_all_parts(side):
    layer = pivot_layer(*factors(6, 7, 3), side, dtype=torch.float64)
    state = {k: v.detach() for k, v in layer.named_parameters()}
    x = inputs(7).requires_grad_()

    def run(x, *parts):
        return torch.func.functional_call(layer, dict(zip(state, parts, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *(p.requires_grad_() for p in state.values())))


@pytest.mark.parametrize("side", SIDES)
def test_compiles_whole(side):
    layer = pivot_layer(*factors(10, 14, 4), side, dtype=torch.float32)
    x = inputs(14, torch.float32)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("m, n, r", SHAPES)
def test_the_pair_of_a_layer_is_its_product(m, n, r, side):
    a, b, _ = factors(m, n, r)
    layer = pivot_layer(a, b, None, side, dtype=torch.float32)
    a2, b2 = layer.factors()
    assert a2.dtype == b2.dtype == torch.float64
    assert not a2.requires_grad
    assert (a2.shape, b2.shape) == ((r, n), (m, r))
    torch.testing.assert_close(b2 @ a2, layer.weight.double(), rtol=1e-5, atol=1e-5)
    exact = pivot_layer(a, b, None, side, dtype=torch.float64)
    a3, b3 = exact.factors()
    torch.testing.assert_close(b3 @ a3, exact.weight, rtol=1e-13, atol=1e-13)


def test_the_pair_of_a_pair():
    a, b, bias = factors(6, 5, 3, dtype=torch.bfloat16)
    a2, b2 = LowRankLinear.from_factors(a, b, bias).factors()
    assert torch.equal(a2, a.double())
    assert torch.equal(b2, b.double())


def test_stored_forms():
    a, b, bias = factors(10, 14, 4)
    pair, pivot = (layer_form(form).build(a, b, bias, dtype=torch.float32) for form in ("pair", "pivot"))
    assert isinstance(pair, LowRankLinear)
    assert isinstance(pivot, PivotLinear)
    for layer, cost in ((pair, PAIR.parameters), (pivot, PIVOT.parameters)):
        assert sum(p.numel() for p in layer.parameters()) == cost(10, 14, 4) + 10
        weights = [p for name, p in layer.named_parameters() if name.endswith("weight")]
        assert {p.dtype for p in weights} == {torch.float32}
        assert all(p.is_contiguous() for p in weights)


def test_parts_are_cast_once():
    """From float64 factors, not from factors that were rounded before."""
    a, b, _ = factors(10, 14, 4)
    exact, low = (pivot_layer(a, b, dtype=dtype) for dtype in (torch.float64, torch.bfloat16))
    assert torch.equal(low.skeleton.weight, exact.skeleton.weight.to(torch.bfloat16))
    assert torch.equal(low.interpolation.weight, exact.interpolation.weight.to(torch.bfloat16))


@pytest.mark.parametrize("form", ["pair", "out", "in"])
def test_b_given_again_makes_up_for_what_casting_leaves_of_a(form):
    """Against least squares, in float64, over the entries that a part holds."""
    a, b, _ = factors(10, 14, 4)
    x = inputs(14).reshape(-1, 14).repeat(3, 1) @ torch.diag(torch.arange(1.0, 15).double())
    problem = Regression.of(x + 0.3 * inputs(14).reshape(-1, 14).flip(0).repeat(3, 1), x @ (b @ a).t())
    kind = torch.bfloat16
    layer = (
        layer_form("pair").build(a, b, None, dtype=kind) if form == "pair" else pivot_layer(a, b, side=form, dtype=kind)
    )
    cast, old = layer.factors()
    before = problem.loss(old @ cast)
    best = best_b(problem, cast)
    layer.set_b(best)
    same, new = layer.factors()
    assert torch.equal(same, cast)
    assert problem.loss(new @ cast) < before
    kept = torch.zeros(10, dtype=torch.bool)
    if form == "out":
        kept[layer.order.argsort()[:4]] = True
    assert torch.equal(new[kept], old[kept])
    torch.testing.assert_close(new[~kept], best[~kept], rtol=2**-8, atol=0)


@pytest.mark.parametrize("layer", [LowRankLinear(6, 5, 3), PivotLinear(6, 5, 3), PivotLinear(6, 5, 3, side="in")])
def test_a_bias_may_be_given_and_taken(layer):
    x, before = torch.ones(1, 6), layer(torch.ones(1, 6)).detach()
    layer.set_bias(torch.arange(5.0))
    torch.testing.assert_close(layer(x), before + torch.arange(5.0))
    assert isinstance(layer.bias, torch.nn.Parameter)
    layer.set_bias(None)
    assert layer.bias is None
    torch.testing.assert_close(layer(x), before)


@pytest.mark.parametrize("rank", [0, 6])
def test_impossible_ranks_are_refused(rank):
    with pytest.raises(ValueError, match="must be 1 to 5"):
        PivotLinear(6, 5, rank)
