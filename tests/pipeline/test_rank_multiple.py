"""`rank_multiple: auto`: which multiple is chosen for given times, and that ranks follow it."""

import pytest
import torch

from helpers import tiny_model
from slimrank import compress, preview
from slimrank.errors import RecipeError
from slimrank.models.targets import Target
from slimrank.pipeline import rank_multiple
from slimrank.pipeline.rank_multiple import (
    chosen_multiple,
    excess_over_line,
    measured_multiple,
    ranks_between,
    shares_of_shapes,
)
from slimrank.recipe import Recipe

CPU = torch.device("cpu")
POWERS = (1, 2, 4, 8, 16, 32, 64)


def target(m, n):
    return Target("layer", "linear", (m, n), 0, False)


def padded(to):
    """The times of hardware that computes ranks as if they were the next multiple of `to`."""
    return lambda layers, tokens: [-(-rank // to) * to for rank in layers.ranks]


@pytest.fixture
def hardware(monkeypatch):
    """Stand in for the measurement."""
    return lambda times: monkeypatch.setattr(rank_multiple, "_seconds", times)


def test_every_power_of_two_is_tested_by_a_rank_that_no_larger_one_divides():
    low, *inner, high = ranks_between(1000, POWERS)
    assert (low % 64, high % 64) == (0, 0)
    assert low < min(inner) < max(inner) < high
    assert [rank & -rank for rank in inner] == list(POWERS[:-1])


@pytest.mark.parametrize(("to", "multiple"), [(64, 64), (8, 1)])
def test_hardware_that_pads_ranks_matters_where_padding_is_much(hardware, to, multiple):
    hardware(padded(to))
    assert measured_multiple([target(4096, 1024)], "pair", torch.float32, CPU) == multiple


def test_hardware_that_likes_all_ranks_gets_multiples_of_one(hardware):
    hardware(lambda layers, tokens: [5.0 + rank for rank in layers.ranks])
    assert measured_multiple([target(1024, 1024)], "pivot", torch.float32, CPU) == 1


@pytest.mark.parametrize("slow", POWERS[:-1])
def test_the_multiple_is_above_every_slow_one(slow):
    excess = [0.5 if power == slow else 0.0 for power in POWERS[:-1]]
    assert chosen_multiple(POWERS, excess) == 2 * slow


def test_one_phase_that_is_slow_is_enough(hardware):
    def times(layers, tokens):
        return [rank * (1.2 if rank % 8 and tokens == 1 else 1.0) for rank in layers.ranks]

    hardware(times)
    assert measured_multiple([target(1024, 1024)], "pair", torch.float32, CPU) == 8


def test_excess_is_over_the_straight_line():
    assert excess_over_line([10, 15, 20], [1.0, 3.0, 2.0]) == pytest.approx([1.0])


def test_shapes_of_few_parameters_are_not_measured():
    many = [target(100, 200)] * 10
    assert shares_of_shapes([*many, target(10, 20)]) == {(100, 200): 1.0}
    assert shares_of_shapes([target(10, 10), target(10, 30)]) == pytest.approx({(10, 10): 0.25, (10, 30): 0.75})
    each = [target(10, n) for n in range(10, 40)]  # none of which has a tenth
    assert len(shares_of_shapes(each)) == 30


def test_small_layers_have_too_few_ranks_for_a_multiple(hardware):
    hardware(padded(64))
    assert measured_multiple([target(16, 16)], "pair", torch.float32, CPU) == 1


def test_real_layers_are_measured():
    assert measured_multiple([target(64, 96)], "pivot", torch.float32, CPU) in (1, 2, 4)


EVEN = {"method": "svd", "keep_ratio": 0.7, "rank_multiple": "auto", "targets": ["*.mlp.*"]}


def even_is_fast(layers, tokens):
    return [rank * (2.0 if rank % 2 else 1.0) for rank in layers.ranks]


def test_ranks_and_report_follow_the_measured_multiple(hardware):
    hardware(even_is_fast)
    result = compress(tiny_model(), evaluation=None, **EVEN)
    ranks = {entry.rank for entry in result.plan.targets.values()} - {"dense"}
    assert ranks
    assert all(rank % 2 == 0 for rank in ranks)
    assert "ranks are multiples of 2: measured on cpu" in result.report["notes"]


def test_the_preview_says_what_was_measured(hardware, tmp_path):
    hardware(even_is_fast)
    tiny_model().save_pretrained(tmp_path / "model")
    found = preview(tmp_path / "model", **EVEN)
    assert "ranks are multiples of 2: measured on cpu" in found["notes"]


def test_a_resumed_run_keeps_its_ranks_whatever_is_measured_then(hardware, tmp_path):
    options = {**EVEN, "allocation": "spectrum", "evaluation": None, "run_dir": tmp_path / "run"}
    hardware(even_is_fast)
    first = compress(tiny_model(), **options)
    hardware(lambda layers, tokens: [float(rank) for rank in layers.ranks])
    second = compress(tiny_model(), **options)
    assert {p: t.rank for p, t in first.plan.targets.items()} == {p: t.rank for p, t in second.plan.targets.items()}
    assert "ranks are multiples of 2: measured on cpu" in second.report["notes"]


@pytest.mark.parametrize("value", [0, -1, "fast", 1.5])
def test_other_multiples_are_refused(value):
    with pytest.raises(RecipeError, match="rank_multiple"):
        Recipe.make({"rank_multiple": value})


def test_a_flag_gives_text():
    assert Recipe.make({"rank_multiple": "8"}).rank_multiple == 8
    assert Recipe.make({"rank_multiple": "auto"}).rank_multiple == "auto"
