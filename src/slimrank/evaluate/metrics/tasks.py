"""Tasks of lm-evaluation-harness: their figures, and how two models differ on the same questions."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from slimrank.evaluate.metric import Compared, ModelMetric, Record, Subject, metric
from slimrank.evaluate.paired import compare_tasks, too_few
from slimrank.evaluate.tasks import TaskResult


@metric
class TasksMetric(ModelMetric):
    """All tasks that are asked for, each with figures of its own; usually shares of right answers."""

    id, title, better = "tasks", "tasks", "higher"

    def measure(self, model: Any, on: Subject) -> Record:
        """Return a `TaskResult` as a record by task."""
        return _records(_run(model, on))

    def compare(self, model: Any, dense: Any, on: Subject) -> Compared:
        """Return the results of the model; against: "tasks" (see `compare_tasks`) and "too_few"."""
        own, other = _run(model, on), _run(dense, on)
        return Compared(_records(own), {"tasks": compare_tasks(own, other), "too_few": too_few(own)})


def _run(model: Any, on: Subject) -> dict[str, TaskResult]:
    return {} if on.tasks is None else on.tasks.run(model, on.tokenizer)


def _records(results: dict[str, TaskResult]) -> Record:
    return {task: asdict(result) for task, result in results.items()}
