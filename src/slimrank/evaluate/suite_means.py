"""The mean accuracy over the tasks of a suite, and how two models differ in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from slimrank.evaluate.paired import MIN_ITEMS_FOR_VERDICT

METRICS = ("acc", "acc_norm")
NORMAL_95 = 1.96


def suite_means(tasks: Mapping[str, Any], averaged: Sequence[str]) -> dict[str, float]:
    """Return the plain mean of acc, and that of acc_norm; a task without acc_norm counts with its acc there.

    Args:
        tasks: the "tasks" of a record.
        averaged: those that count.
    """
    return {
        metric: sum(tasks[task]["metrics"][metric_of(tasks[task], metric)]["value"] for task in averaged)
        / len(averaged)
        for metric in METRICS
    }


def metric_of(result: Mapping[str, Any], metric: str) -> str:
    """Return the metric that a task has of these: itself, or acc."""
    return metric if metric in result["metrics"] else "acc"


def mean_differences(
    tasks: Mapping[str, Any], against: Mapping[str, Any], averaged: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return how the mean accuracy differs from that of another model, with a 95 % interval.

    The tasks are independent samples of paired questions, so the variance of the mean is that of the tasks' mean
    differences over their number squared. A question is worth 1 where only the model is right, -1 where only the other
    is, else 0.

    Args:
        tasks: the "tasks" of a record.
        against: the "tasks" of its comparison, see `evaluate.paired.compare_tasks`.
        averaged: those that count.

    Returns:
        acc and acc_norm -> "value" (of the other), "difference", "low", "high" and "significant" (None where a task has
        too few questions to tell).
    """
    return {
        metric: _difference([(against[t][metric_of(tasks[t], metric)], tasks[t]["count"]) for t in averaged])
        for metric in METRICS
        if all(metric_of(tasks[t], metric) in against.get(t, {}) for t in averaged)
    }


def _difference(found: Sequence[tuple[Mapping[str, Any], int]]) -> dict[str, Any]:
    mean = sum(each["difference"] for each, _ in found) / len(found)
    variance = sum(
        max(0.0, (each["gained"] + each["lost"]) / count - each["difference"] ** 2) / max(1, count - 1)
        for each, count in found
    )
    few = any(count < MIN_ITEMS_FOR_VERDICT for _, count in found)
    half = NORMAL_95 * math.sqrt(variance) / len(found)
    return {
        "value": sum(each["value"] for each, _ in found) / len(found),
        "difference": mean,
        "low": mean - half,
        "high": mean + half,
        "significant": None if few else not mean - half <= 0 <= mean + half,
    }
