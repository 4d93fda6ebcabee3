"""Choosing inputs and letting them stand in for the others, against brute force on tokens."""

from itertools import combinations

import pytest
import torch

from slimrank.linalg.regression import Regression
from slimrank.linalg.subset import SELECTIONS, eliminate, pivoted, restricted, select

TOKENS, N, M = 60, 7, 4


def tokens(seed=0, n=N):
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=draw, dtype=torch.float64)
    return torch.randn(TOKENS, n, generator=draw, dtype=torch.float64) @ mixing


def weight(seed=1, n=N):
    return torch.randn(M, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise(seed=2):
    return torch.randn(TOKENS, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def form(seed=3):
    root = torch.randn(M, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.t()


def loss_of(x, t, kept, row=None):
    """The least squares of tokens, by QR."""
    found = torch.linalg.lstsq(x[:, kept], t).solution
    error = t - x[:, kept] @ found
    return float((error @ (torch.eye(M, dtype=torch.float64) if row is None else row) * error).sum())


def test_the_weight_of_chosen_inputs_is_least_squares_on_tokens():
    x, w, kept = tokens(), weight(), torch.tensor([0, 2, 5])
    t = x @ w.t() + noise()
    found = restricted(Regression.of(x, t), kept)
    assert torch.allclose(found, torch.linalg.lstsq(x[:, kept], t).solution.t())


def test_it_is_the_nystrom_approximation_where_the_target_comes_from_the_inputs():
    x, w, kept = tokens(), weight(), torch.tensor([1, 3, 4])
    c = x.t() @ x
    expected = w @ c[:, kept] @ torch.linalg.inv(c[kept][:, kept])
    assert torch.allclose(restricted(Regression.of(x, x @ w.t()), kept), expected)


def test_all_inputs_give_the_weight_back():
    x, w = tokens(), weight()
    assert torch.allclose(restricted(Regression.of(x, x @ w.t()), torch.arange(N)), w)


@pytest.mark.parametrize("row", [None, form()])
def test_eliminating_takes_the_input_away_that_is_missed_least(row):
    """Every step by the definition: the least squares of all sets that lack one more input."""
    x = tokens()
    t = x @ weight().t() + noise()
    left = list(range(N))
    while len(left) > 2:
        left = list(min(combinations(left, len(left) - 1), key=lambda kept: loss_of(x, t, list(kept), row)))
        assert eliminate(Regression.of(x, t), len(left), row).tolist() == left


@pytest.mark.parametrize("row", [None, form()])
def test_pivoted_cholesky_takes_what_is_not_explained_yet(row):
    """Every step by the definition: the input of the largest residual after projection on those chosen."""
    x, w = tokens(), weight()
    g = torch.eye(M, dtype=torch.float64) if row is None else row
    scaled = x * torch.stack([column @ g @ column for column in w.t()]).sqrt()
    chosen = []
    for count in range(1, N):
        basis = torch.linalg.qr(scaled[:, chosen]).Q if chosen else scaled.new_zeros(TOKENS, 0)
        rest = (scaled - basis @ (basis.t() @ scaled)).square().sum(dim=0)
        rest[chosen] = -1
        chosen.append(int(rest.argmax()))
        assert pivoted(Regression.of(x, x @ w.t()), count, row).tolist() == sorted(chosen)


def test_leverage_scores_are_those_of_the_definition():
    x, w = tokens(), weight()
    c = x.t() @ x
    scores = (c @ torch.linalg.inv(c + c.diagonal().mean() * torch.eye(N))).diagonal()
    expected = sorted(scores.argsort(descending=True)[:3].tolist())
    assert select(Regression.of(x, x @ w.t()), 3, "leverage").tolist() == expected


@pytest.mark.parametrize("selection", SELECTIONS)
def test_repeated_and_dead_inputs_go_first(selection):
    """Of seven inputs three are copies or zero: the four others lose nothing."""
    x = tokens(n=4)
    x = torch.cat([x, x[:, :1], x[:, 1:2], torch.zeros(TOKENS, 1)], dim=1)
    t = x @ weight().t()
    kept = select(Regression.of(x, t), 4, selection)
    if selection != "leverage":  # scores do not know of each other: copies share theirs
        assert loss_of(x, t, kept) < 1e-12 * float(t.square().sum())
    assert 6 not in kept.tolist()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_relabelled_inputs_give_the_same_choice(selection):
    x, w = tokens(), weight()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(5))
    here = select(Regression.of(x, x @ w.t()), 3, selection)
    there = select(Regression.of(x[:, order], x @ w.t()), 3, selection)
    assert sorted(order[there].tolist()) == here.tolist()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_no_input_is_chosen_twice_and_more_of_them_lose_less(selection):
    x, w = tokens(), weight()
    t = x @ w.t() + noise()
    losses = []
    for count in range(1, N + 1):
        kept = select(Regression.of(x, t), count, selection).tolist()
        assert len(set(kept)) == count
        losses.append(loss_of(x, t, kept))
    assert losses[-1] < losses[0]


def test_fewer_living_inputs_than_are_wanted():
    x = torch.cat([tokens(n=3), torch.zeros(TOKENS, 4)], dim=1)
    assert select(Regression.of(x, x @ weight().t()), 5, "eliminate").tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("count", [0, N + 1])
def test_as_many_as_there_are_not(count):
    x = tokens()
    with pytest.raises(ValueError, match="cannot be chosen"):
        select(Regression.of(x, x @ weight().t()), count, "eliminate")
