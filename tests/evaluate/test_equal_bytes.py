"""The functions of benchmarks/pruning.py against brute force on tiny matrices."""

import sys
from itertools import combinations, product
from pathlib import Path

import pytest
import torch

from helpers import tiny_model

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import pruning


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_bits_of_a_sparse_weight_are_those_of_its_files():
    weight = random(8, 64) * pruning.largest_per_row(random(8, 64, seed=1), 20)
    numbers = 16 * int((weight != 0).sum())
    mask = weight.numel()
    indices = sum(6 for _ in weight.nonzero()) + 32 * 9  # 64 columns are told apart by 6 bits
    assert pruning.sparse_bits(160, 8, 64) == numbers + min(mask, indices)
    assert min(mask, indices) == mask
    assert pruning.sparse_bits(8, 1000, 1024) == 8 * 16 + 8 * 10 + 1001 * 32  # so few that indices take less


def test_bits_of_two_of_four_and_of_signs():
    assert pruning.two_of_four_bits(3, 8) == 3 * 4 * (16 + 2)
    assert pruning.signs_bits(3, 8, 4, planes=2) == 2 * (3 * 8 + 3 * 2 * 16)


def test_the_largest_scores_are_kept():
    scores = random(3, 6).abs()
    best = max(combinations(range(18), 5), key=lambda some: sum(scores.flatten()[i] for i in some))
    assert set(pruning.largest(scores, 5).flatten().nonzero().flatten().tolist()) == set(best)
    rows = pruning.largest_per_row(scores, 2)
    for row, mask in zip(scores, rows, strict=True):
        best = max(combinations(range(6), 2), key=lambda some: sum(row[i] for i in some))
        assert set(mask.nonzero().flatten().tolist()) == set(best)


def test_two_of_every_four_are_kept():
    scores = random(3, 8).abs()
    masks = pruning.two_of_four(scores).reshape(-1, 4)
    for four, mask in zip(scores.reshape(-1, 4), masks, strict=True):
        best = max(combinations(range(4), 2), key=lambda some: sum(four[i] for i in some))
        assert set(mask.nonzero().flatten().tolist()) == set(best)


def test_wanda_scores_one_weight_by_what_leaving_it_out_changes():
    weight, x = random(3, 4), random(10, 4, seed=1)
    scores = pruning.wanda_scores(weight, x.square().sum(0))
    for i, j in product(range(3), range(4)):
        without = weight.clone()
        without[i, j] = 0
        assert float((x @ (weight - without).t()).norm()) == pytest.approx(float(scores[i, j]), rel=1e-5)


def test_scales_of_signs_are_least_squares():
    weight = random(2, 8)
    found = pruning.signs(weight, 4, 1, torch.float32)
    assert torch.equal(found.sign(), weight.sign())
    error = (weight - found).square().sum()
    for group in range(2):
        for factor in (0.9, 1.1):
            other = found.clone()
            other[:, 4 * group : 4 * group + 4] *= factor
            assert (weight - other).square().sum() > error
    assert (weight - pruning.signs(weight, 4, 2, torch.float32)).square().sum() < error


def test_as_many_are_kept_in_rows_as_fit():
    shapes, bits = [(4, 16), (8, 32), (2, 64)], 4000

    def taken(counts):
        return sum(pruning.sparse_bits(k * m, m, n) for k, (m, n) in zip(counts, shapes, strict=True))

    counts = pruning.kept_in_rows(shapes, bits)
    parts = sorted({k / n for _, n in shapes for k in range(n + 1)})
    fitting = [part for part in parts if taken([int(part * n + 1e-9) for _, n in shapes]) <= bits]
    assert counts == [int(max(fitting) * n + 1e-9) for _, n in shapes]
    assert taken(counts) <= bits


def test_blocks_of_least_influence_go_first():
    assert pruning.blocks_to_keep([0.3, 0.1, 0.2, 0.4], [10, 10, 10, 10], 29) == [0, 3]
    assert pruning.blocks_to_keep([0.3, 0.1, 0.2, 0.4], [10, 10, 10, 10], 40) == [0, 1, 2, 3]


def test_a_block_left_out_passes_hidden_states_on():
    model, ids = tiny_model("llama"), torch.arange(12)[None]
    without = tiny_model("llama")
    del without.model.layers[1]
    without.config.num_hidden_layers = 2
    model.model.layers[1] = pruning.LeftOut()
    with torch.no_grad():
        found, expected = (m(input_ids=ids, use_cache=False).logits for m in (model, without))
    assert torch.equal(found, expected)


def test_squares_of_inputs():
    layer, x = torch.nn.Linear(4, 2), random(3, 5, 4)
    with pruning.InputSquares({"layer": layer}) as squares:
        layer(x[:1])
        layer(x[1:])
    layer(x)
    assert torch.allclose(squares.sums["layer"], x.double().square().sum((0, 1)))
