"""Pieces of a layer on several processes give together what the whole layer gives."""

from itertools import product

import pytest
import torch

from slimrank.layers.forms import layer_form, pivot_layer
from slimrank.layers.low_rank import LowRankLinear
from slimrank.layers.residual import ResidualLinear
from slimrank.serving.compute import Packed, Shard
from slimrank.serving.sharding import Span, axis_of, cut, local, span_of

OUT, IN, RANK = 24, 36, 12


def layer_of(kind):
    torch.manual_seed(0)
    if kind == "dense":
        return "dense", "", torch.nn.Linear(IN, OUT, bias=False).double()
    if kind == "residual":
        return kind, "", ResidualLinear(IN, OUT, RANK).double()
    A, B = torch.randn(RANK, IN, dtype=torch.float64), torch.randn(OUT, RANK, dtype=torch.float64)
    if kind == "pair":
        return kind, "", LowRankLinear.from_factors(A, B)
    return "pivot", kind, pivot_layer(A, B, side=kind, dtype=torch.float64)


def piece(kind, side, matrices, span):
    """As an engine makes it: some tensors are cut as they are read, the others afterwards."""
    read = {name: cut(matrix, axis_of(span.role, kind, side, name), span) for name, matrix in matrices.items()}
    kind, parts = local(kind, side, read, span)
    return kind, side if kind == "pivot" else "", parts


@pytest.mark.parametrize("name", ["dense", "pair", "residual", "out", "in"])
@pytest.mark.parametrize("role, processes", list(product(["column", "row"], [2, 3, 4])))
def test_processes_give_the_whole(name, role, processes):
    kind, side, layer = layer_of(name)
    matrices = dict(layer.state_dict())
    x = torch.randn(2, 5, IN, dtype=torch.float64)
    total = OUT if role == "column" else IN
    spans = [span_of(role, total, total // processes, rank) for rank in range(processes)]
    modules = [Packed([Shard(*piece(kind, side, matrices, span))]) for span in spans]
    if role == "column":
        found = torch.cat([module(x) for module in modules], -1)
    else:
        inputs = [x.narrow(-1, span.start, span.size) for span in spans]
        found = sum(module(part) for module, part in zip(modules, inputs, strict=True))
    assert torch.allclose(found, layer(x), atol=1e-10)


@pytest.mark.parametrize("name", ["pair", "out", "in"])
def test_the_sum_over_processes_may_be_that_of_z(name):
    """Then each process has all outputs, and as many numbers are summed as the rank is."""
    kind, side, layer = layer_of(name)
    x = torch.randn(3, IN, dtype=torch.float64)
    spans = [span_of("row", IN, IN // 2, rank) for rank in range(2)]
    modules = [Packed([Shard(*piece(kind, side, dict(layer.state_dict()), span))]) for span in spans]
    z = sum(m.first(x.narrow(-1, s.start, s.size)) for m, s in zip(modules, spans, strict=True))
    assert z.shape == (3, RANK)
    for module, span in zip(modules, spans, strict=True):
        assert torch.allclose(module(x.narrow(-1, span.start, span.size), lambda own: z), layer(x), atol=1e-10)


def test_a_process_holds_less_of_what_can_be_cut():
    kind, _, layer = layer_of("pair")
    span = span_of("column", OUT, OUT // 4, 1)
    _, _, parts = piece(kind, "", dict(layer.state_dict()), span)
    assert parts["A.weight"].shape == (RANK, IN)
    assert parts["B.weight"].shape == (OUT // 4, RANK)
    kind, side, layer = layer_of("out")
    pieces = [piece(kind, side, dict(layer.state_dict()), span_of("column", OUT, OUT // 4, r))[2] for r in range(4)]
    assert sum(len(p["interpolation.weight"]) for p in pieces) == OUT - RANK


def test_key_heads_may_be_on_several_processes():
    assert [span_of("column", 64, 32, rank, copies=2).start for rank in range(4)] == [0, 0, 32, 32]
    with pytest.raises(ValueError, match="cannot be cut into pieces of 24"):
        span_of("column", 64, 24, 0)
    with pytest.raises(ValueError, match="for process 2"):
        span_of("column", 64, 32, 2)


@pytest.mark.parametrize("form", ["pair:int4-g12", "pivot:int8", "dense:int8"])
def test_a_whole_layer_is_not_cut(form):
    kind = form.partition(":")[0]
    assert layer_form(form)
    assert axis_of("whole", kind, "out", "weight") is axis_of("whole", kind, "out", "skeleton.weight") is None
    assert local(kind, "out", {}, Span()) == (kind, {})
