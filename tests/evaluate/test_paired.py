import math

import numpy as np
import pytest
import torch
from scipy.stats import norm, t, ttest_1samp

from helpers import tiny_model
from slimrank.errors import DataError
from slimrank.evaluate import paired as module
from slimrank.evaluate.agreement import agreement
from slimrank.evaluate.paired import compare_perplexities, compare_tasks, paired, resampled_means, too_few
from slimrank.evaluate.tasks import Metric, TaskResult


def differences(count, mean=0.0, seed=0):
    return np.random.default_rng(seed).normal(mean, 1.0, count)


def naive_means(values, seed, resamples):
    """One resample, one draw at a time."""
    generator = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        drawn = generator.integers(len(values), size=len(values))
        means.append(sum(values[i] for i in drawn) / len(values))
    return np.array(means)


@pytest.mark.parametrize("at_once", [1, 100, 2**22])
def test_resamples_equal_a_naive_loop(monkeypatch, at_once):
    monkeypatch.setattr(module, "MAX_INDICES_AT_ONCE", at_once)
    values = differences(17)
    assert resampled_means(values, seed=3, resamples=200) == pytest.approx(naive_means(values, 3, 200))


def test_ten_thousand_resamples_by_default():
    assert len(resampled_means(differences(5), seed=0)) == 10_000


@pytest.mark.parametrize("count", [30, 200])
def test_from_30_items_on_the_interval_is_that_of_sorted_means(count):
    values = differences(count, mean=0.4)
    found = paired(values, np.zeros(count))
    means = np.sort(resampled_means(values, seed=0))
    tail = 10_000 * norm.cdf(-t.ppf(0.975, count - 1) * (count / (count - 1)) ** 0.5)
    assert 170 < tail < 250  # a little farther out than the 2.5 % of a plain percentile interval
    assert found.difference == pytest.approx(values.mean())
    assert means[int(tail) - 1] <= found.low <= means[int(tail) + 1]
    assert means[-int(tail) - 2] <= found.high <= means[-int(tail)]


@pytest.mark.parametrize("count", [2, 8, 29])
def test_below_30_items_the_interval_is_that_of_student(count):
    values = differences(count, mean=0.4)
    found = paired(values, np.zeros(count))
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.significant == (None if count < 8 else not expected.low <= 0 <= expected.high)


@pytest.mark.parametrize("count", [8, 12, 20, 30, 50])
@pytest.mark.parametrize("kind", ["normal", "answers"])
def test_identical_models_seldom_differ_significantly(kind, count, monkeypatch):
    """A percentile bootstrap called 12 % of comparisons of 8 items significant."""
    monkeypatch.setattr(module, "RESAMPLES", 2_000)
    rng = np.random.default_rng(count)
    draw = {"normal": lambda: rng.normal(size=count), "answers": lambda: rng.choice([-1.0, 0.0, 0.0, 1.0], size=count)}
    found = [paired(draw[kind](), np.zeros(count)) for _ in range(1_000)]
    assert np.mean([pair.significant for pair in found]) < 0.07


def test_the_interval_holds_the_truth_as_often_as_it_says():
    intervals = [paired(differences(50, 0.3, seed), np.zeros(50)) for seed in range(300)]
    share = np.mean([i.low <= 0.3 <= i.high for i in intervals])
    assert 0.93 < share < 0.97


def test_its_width_is_that_of_the_standard_error():
    values = differences(400)
    found = paired(values, np.zeros(400))
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)


def test_pairs_see_what_values_alone_hide():
    """Windows differ much more than models do."""
    dense = 10 * differences(50)
    model = dense + 0.1 + 0.01 * differences(50, seed=1)
    assert paired(model, dense).significant
    assert not paired(model, dense[::-1]).significant


@pytest.mark.parametrize("shift, significant", [(0, False), (1, True), (-1, True)])
def test_significant_means_that_zero_is_outside(shift, significant):
    found = paired(np.arange(8) + shift, np.arange(8))
    assert found.significant is significant
    assert found.low == found.high == found.difference == shift


@pytest.mark.parametrize("count", [2, 7])
def test_too_few_items_get_an_interval_and_no_verdict(count):
    found = paired(np.arange(count) + 1, np.arange(count))
    assert found.significant is None
    assert found.low == found.high == 1


def test_the_same_each_time_and_no_global_state():
    state = np.random.get_state()[1].copy()
    assert paired(differences(30), np.zeros(30)) == paired(differences(30), np.zeros(30))
    assert paired(differences(30), np.zeros(30)) != paired(differences(30), np.zeros(30), seed=1)
    assert (np.random.get_state()[1] == state).all()


def test_one_item_has_no_spread():
    with pytest.raises(DataError, match="at least two"):
        paired([1.0], [2.0])


def test_texts():
    windows = torch.randint(250, (8, 16), generator=torch.Generator().manual_seed(0))
    both = agreement(tiny_model(seed=1), tiny_model(), windows)
    record = compare_perplexities(both.model, both.dense)
    assert record["ratio"] == pytest.approx(both.model.perplexity / both.dense.perplexity)
    assert record["ratio_low"] == pytest.approx(math.exp(record["low"]))
    assert record["ratio_low"] < record["ratio"] < record["ratio_high"]
    assert record["perplexity"] == both.dense.perplexity
    assert record["significant"] == (not record["ratio_low"] <= 1 <= record["ratio_high"])


def result(**questions):
    metrics = {name: Metric(sum(v) / len(v), None) for name, v in questions.items()}
    return TaskResult(metrics, 4, 4, 0, 1.0, {name: tuple(v) for name, v in questions.items()})


def test_tasks_count_flips():
    model, dense = result(acc=[0.0, 0.0, 1.0, 1.0]), result(acc=[1.0, 1.0, 0.0, 1.0])
    found = compare_tasks({"t": model}, {"t": dense})["t"]["acc"]
    assert (found["lost"], found["gained"]) == (2, 1)
    assert found["value"] == 0.75
    assert found["difference"] == -0.25
    assert found["low"] <= -0.25 <= found["high"]
    assert found["significant"] is None  # four questions are too few


def test_values_between_right_and_wrong_have_no_flips():
    found = compare_tasks({"t": result(acc=[0.2, 0.4])}, {"t": result(acc=[0.3, 0.9])})["t"]["acc"]
    assert found["difference"] == pytest.approx(-0.3)
    assert "lost" not in found


def test_metrics_that_are_no_mean_of_questions_are_left_out():
    odd = TaskResult({"perplexity": Metric(7.0, None)}, 2, 2, 0, 1.0, {"perplexity": (1.0, 2.0)})
    assert compare_tasks({"t": odd}, {"t": odd}) == {"t": {}}
    assert too_few({"t": odd}) == {}


def test_a_metric_of_one_question_is_left_out_and_named():
    one = {"few": result(acc=[1.0], f1=[0.5]), "many": result(acc=[1.0, 0.0])}
    found = compare_tasks(one, one)
    assert found["few"] == {}
    assert found["many"]["acc"]["difference"] == 0
    assert too_few(one) == {"few": ["acc", "f1"]}
