"""Which token each row of a layer's input is, by the shape of the input and by what a router chose."""

import pytest
import torch
from test_gradients import close, ids
from torch import nn

from architectures import random_model
from slimrank.errors import ModelError
from slimrank.layers.experts import Experts, unfuse
from slimrank.statistics.calls import UNPLACED
from slimrank.statistics.catalogue import GatherOptions
from slimrank.statistics.collector import Collector
from slimrank.statistics.routing import Routing
from slimrank.statistics.tokens import Tokens, rows_per_token

CPU = torch.device("cpu")
W, T = 3, 8


@pytest.mark.parametrize(
    "leading, rows",
    [
        ((W, T), 1), ((W, 1, T), 1), ((W * T,), 1), ((1, W * T), 1), ((W, 2, T // 2), 1), ((W, T, 1), 1),
        ((W, T, 4), 4), ((W * T, 4), 4), ((W, 2, T // 2, 4), 4),
        ((T, W), None), ((4, W, T), None), ((W, 4, T), None), ((W, T + 1), None), ((W * T - 1,), None), ((), None),
        ((W * T * 2,), None), ((T, 1, W), None), ((2, W * T), None), ((0,), None),
    ],
)  # fmt: skip
def test_rows_of_a_token(leading, rows):
    assert rows_per_token(leading, W, T) == rows


@pytest.mark.parametrize("leading, rows", [((1, T), 1), ((T,), 1), ((T, 1), 1), ((T, 4), 4), ((4, T), None)])
def test_rows_of_a_token_of_a_single_window(leading, rows):
    assert rows_per_token(leading, 1, T) == rows


@pytest.mark.parametrize("shape", [(W, T), (W, 1, T), (W * T,), (W, T, 2)])
def test_tokens_of_padded_windows(shape):
    mask = torch.ones(W, T, dtype=torch.long)
    mask[1, 5:] = 0
    x = torch.arange(W * T).view(W, T, 1).float()
    x = x[..., None].expand(W, T, 2, 1) if shape == (W, T, 2) else x.reshape(*shape, 1)
    batch = Tokens(mask, (W, T))
    numbers = batch.numbers(x)
    assert torch.equal(
        batch.real(x, numbers).flatten().long(), numbers[numbers.view(-1) % T < (numbers // T != 1) * T + 5]
    )
    places = batch.places(x, numbers)
    assert places.lengths.tolist() == [T, 5, T]
    found = places.by_window(batch.real(x, numbers))
    assert [len(rows) for rows in found.values()] == [k * (len(x.flatten()) // (W * T)) for k in (T, 5, T)]
    assert places.position.max() == T - 1


def rows_of(layer, shape, gathering, routed=frozenset()):
    """The statistics of a layer that reads random tokens in some shape; its loss is the sum of squares."""
    x = torch.randn(W, T, layer.in_features, generator=torch.Generator().manual_seed(0))
    collector = Collector({"layer": layer}, gathering, CPU, routed=routed)
    with collector:
        collector.begin(None, (W, T))
        x = x.reshape(*shape, -1).requires_grad_()
        torch.autograd.grad(layer(x).square().sum(), x)
    return collector.statistics["layer"]


TRIMMED = GatherOptions(needs={"row", "weight_squares", "gradients"}, trim=0.25, clip=(0.8, 1.1), accumulate=2)


@pytest.mark.parametrize("m, n", [(4, 6), (6, 4)])
@pytest.mark.parametrize("shape", [(W, 1, T), (W * T,)])
def test_another_shape_of_the_same_tokens(shape, m, n):
    layer = nn.Linear(n, m)
    expected, found = rows_of(layer, (W, T), TRIMMED), rows_of(layer, shape, TRIMMED)
    close(found.row.data, expected.row.data)
    close(found.weight_squares, expected.weight_squares)
    assert len(found.samples) == len(expected.samples) == 2
    assert found.notes == ()


@pytest.mark.parametrize("padded", [False, True])
def test_windows_of_other_tokens(padded):
    """Pooled or learnt tokens are no tokens of the text, but belong to its windows."""
    x = torch.randn(W, T + 4, 6)
    batch = Tokens(torch.zeros(W, T) if padded else None, (W, T))
    places = batch.places(x, batch.numbers(x))
    assert places.lengths.tolist() == [T + 4] * W
    for window, rows in places.by_window(batch.real(x, batch.numbers(x))).items():
        assert torch.equal(rows, x[window])


def test_tokens_before_windows_are_not_mistaken():
    """Their gradients weigh as much as if they were trimmed, and windows that cannot be told apart are refused."""
    layer, row = nn.Linear(4, 3), GatherOptions(needs={"row"}, trim=0.25, clip=None)
    plain = rows_of(layer, (W, T), GatherOptions(needs={"row"}, trim=0, clip=None))
    found = rows_of(layer, (T, W), row)
    assert found.notes == (UNPLACED,)
    close(found.row.data, plain.row.data / 2)
    for need in ("weight_squares", "gradients"):
        with pytest.raises(ModelError, match="nothing tells their windows apart") as refused:
            rows_of(layer, (T, W), GatherOptions(needs={need}))
        assert "--batch-size 1" in refused.value.hint


def test_experts_of_a_class_of_their_own_are_not_trimmed_by_chance():
    """As many tokens as there are in a batch, but nobody knows which."""
    layer = nn.Linear(4, 3)
    routed = frozenset({"layer"})
    plain = rows_of(layer, (W * T,), GatherOptions(needs={"row"}, trim=0, clip=None))
    found = rows_of(layer, (W * T,), GatherOptions(needs={"row"}, trim=0.25, clip=(0.1, 10)), routed=routed)
    close(found.row.data, plain.row.data / 2)
    with pytest.raises(ModelError, match="nothing tells their windows apart"):
        rows_of(layer, (W * T,), GatherOptions(needs={"weight_squares"}), routed=routed)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


@pytest.mark.parametrize("size", [1, W])
def test_a_layer_that_is_called_twice_has_one_gradient_a_window(size):
    model, xs = Twice(), torch.randn(W, T, 6, generator=torch.Generator().manual_seed(0))
    squares = []
    for x in xs:
        (gradient,) = torch.autograd.grad(model(x).square().sum(), model.layer.weight)
        squares.append(gradient.square().sum(dim=0))
    with Collector(
        {"layer": model.layer}, GatherOptions(needs={"weight_squares", "gradients"}, accumulate=1), CPU
    ) as found:
        for part in xs.split(size):
            found.begin(None, (len(part), T))
            part = part.clone().requires_grad_()
            torch.autograd.grad(model(part).square().sum(), part)
    close(found.statistics["layer"].weight_squares, sum(squares))
    assert len(found.statistics["layer"].samples) == W


@pytest.mark.parametrize("name", ["mixtral", "llama4"])
def test_tokens_of_experts_are_trimmed_by_their_place_in_the_window(name):
    model = random_model(name)
    block = model.model.layers[1]
    unfuse(model)
    path = next(path for path, module in block.named_modules() if isinstance(module, Experts))
    experts = block.get_submodule(path)
    layers = {f"{path}.{kind}.{e}": m for kind in ("up", "down") for e, m in enumerate(getattr(experts, kind))}
    sent, outputs = {}, {}
    experts.register_forward_pre_hook(lambda module, args: sent.update({e: _sent(e, *args) for e in range(4)}))
    for layer_path, layer in layers.items():
        layer.register_forward_hook(lambda module, args, output, p=layer_path: outputs.update({p: output}))
    gathering = GatherOptions(needs={"row"}, trim=0.25, clip=None)
    collector = Collector(layers, gathering, CPU, routed=frozenset(layers), routing=Routing.among(block, layers))
    with collector:
        collector.begin(None, (W, T))
        loss = model(input_ids=ids(W, T)).logits.square().sum()
        for output in outputs.values():
            output.retain_grad()
        loss.backward()
    assert len(outputs) == len(layers) == 8
    for layer_path, output in outputs.items():
        position = sent[int(layer_path.rpartition(".")[2])] % T
        g = output.grad[(position >= 2) & (position < 6)].double()
        weight = layers[layer_path].weight.detach().double()
        gram, found = g.T @ g, collector.statistics[layer_path].row
        close(found.data, weight.T @ gram @ weight if found.seen else gram)


def _sent(expert, tokens, chosen=None, weights=None):
    """The tokens that go to an expert of four, by what the router chose, or by the copies that are not zero."""
    if chosen is None:
        return tokens.chunk(4)[expert].any(dim=-1).nonzero()[:, 0]
    return (chosen == expert).any(dim=-1).nonzero()[:, 0]
