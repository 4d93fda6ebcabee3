"""Zero-shot and few-shot tasks, as lm-evaluation-harness runs them: same prompts, same metrics, same figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any

from slimrank.errors import RecipeError
from slimrank.evaluate.harness import BATCH_SIZE, language_model, quiet, seeded
from slimrank.evaluate.task_files import check_installed, load_tasks
from slimrank.models.contexts import evaluating
from slimrank.progress import Progress


@dataclass(frozen=True)
class TaskRequest:
    """Which tasks to run.

    Attributes:
        names: tasks or groups of lm-evaluation-harness, or of the folder.
        folder: a folder of task files (.yaml) that win over those of lm-evaluation-harness.
        shots: solved examples in front of each question; None takes each task's own number.
        limit: questions of each task; None takes all.

    Raises:
        RecipeError: no name, or a number out of range.
    """

    names: tuple[str, ...]
    folder: str | Path | None = None
    shots: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if not self.names or not all(name.strip() for name in self.names):
            raise RecipeError("no task is named, or one has no name.", "--tasks arc_easy,piqa")
        if self.shots is not None and self.shots < 0:
            raise RecipeError(f"--shots must be 0 or more, got {self.shots}.", "--shots 0, or leave it out")
        if self.limit is not None and self.limit < 1:
            raise RecipeError(f"--limit must be 1 or more, got {self.limit}.", "--limit 100, or leave it out")


@dataclass(frozen=True)
class Metric:
    """A figure of a task and its standard error (None where lm-evaluation-harness gives none)."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class TaskResult:
    """The results of a model on one task, or on a group of tasks that has figures of its own.

    Attributes:
        metrics: figures by name, with the name of the answer's filter after a comma where it is not "none".
        count: questions asked.
        available: questions of the task.
        shots: solved examples in front of each; None for a group.
        version: of the task.
        questions: the value of each question, of metrics that are numbers there; empty for a group.
    """

    metrics: dict[str, Metric]
    count: int
    available: int
    shots: int | None
    version: Any
    questions: dict[str, tuple[float, ...]]


def results_of(record: Mapping[str, Any]) -> dict[str, TaskResult]:
    """Return the results of the tasks in a record that comes out of a file."""
    return {
        task: TaskResult(
            **{
                **result,
                "metrics": {name: Metric(**metric) for name, metric in result["metrics"].items()},
                "questions": {name: tuple(values) for name, values in result["questions"].items()},
            }
        )
        for task, result in record["tasks"].items()
    }


class Tasks:
    """Tasks with their questions, ready to be put to any number of models.

    Args:
        request: which.
        progress: told where a name or a number does not mean what it seems to, and how far the answers are.

    Raises:
        MissingExtraError: lm-evaluation-harness is not installed.
        RecipeError: an unknown task, one asked for twice, or too few examples for so many shots.
        DataError: no such folder, a broken file in it, or questions that cannot be loaded (no network).
    """

    def __init__(self, request: TaskRequest, progress: Progress | None = None) -> None:
        self.request, self.progress = request, progress or Progress()
        check_installed()
        folder = None if request.folder is None else Path(request.folder).expanduser()
        with quiet(), seeded():
            self.loaded = load_tasks(request.names, folder, request.shots, self.progress)

    def described(self) -> dict[str, Any]:
        """Return what was asked, for a record."""
        return {
            "names": list(self.loaded.names),
            "tasks_dir": None if self.request.folder is None else str(self.request.folder),
            "shots": self.request.shots,
            "limit": self.request.limit,
            "batch_size": BATCH_SIZE,
            "lm_eval": version("lm-eval"),
        }

    def run(self, model: Any, tokenizer: Any) -> dict[str, TaskResult]:
        """Put all questions to a model, where it is, with no chat template.

        The figures are those of the command `lm_eval` with the same batch size and dtype.

        Raises:
            DataError: an answer to choose from is longer than the model's context.
            NonFiniteError: NaN in the likelihood of an answer.
        """
        from lm_eval.evaluator import evaluate

        with quiet(), seeded(), evaluating(model):
            self.loaded.reseed()
            asked = language_model(model, tokenizer, self.progress)
            tasks = {"tasks": self.loaded.tasks, "groups": self.loaded.groups}
            found = evaluate(asked, tasks, limit=self.request.limit)
        if asked.cut:
            context = f"the model's context of {asked.max_length} tokens"
            self.progress.note(f"{asked.cut} prompts are too long for {context}: their beginnings were left out")
        return _results(found)


def _results(found: Mapping[str, Any]) -> dict[str, TaskResult]:
    """Return the results of lm-evaluation-harness by task; groups that have figures of their own come last."""
    names = [*found["samples"], *found.get("groups", {})]
    return {name: _result(found, name) for name in names}


def _result(found: Mapping[str, Any], name: str) -> TaskResult:
    metrics = _metrics(found["results"][name])
    counts = [found["n-samples"][task] for task in _tasks_of(found, name)]
    return TaskResult(
        metrics,
        count=sum(c["effective"] for c in counts),
        available=sum(c["original"] for c in counts),
        shots=found["n-shot"].get(name),
        version=found["versions"].get(name),
        questions=dict(_questions(found["samples"].get(name, []), metrics)),
    )


def _tasks_of(found: Mapping[str, Any], name: str) -> list[str]:
    """Return the tasks in a group, or the task itself."""
    members = found["group_subtasks"].get(name)
    return [name] if members is None else [task for member in members for task in _tasks_of(found, member)]


def _metrics(figures: Mapping[str, Any]) -> dict[str, Metric]:
    """Take metrics out of "acc,none" and "acc_stderr,none"."""
    metrics = {}
    for key, value in figures.items():
        metric, comma, answer_filter = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = figures.get(f"{metric}_stderr,{answer_filter}")
            label = metric if answer_filter == "none" else key
            metrics[label] = Metric(float(value), float(stderr) if isinstance(stderr, Real) else None)
    return metrics


def _questions(
    samples: list[Mapping[str, Any]], metrics: Mapping[str, Metric]
) -> Iterator[tuple[str, tuple[float, ...]]]:
    for label in metrics:
        metric, _, answer_filter = label.partition(",")
        values = [s.get(metric) for s in samples if s["filter"] == (answer_filter or "none")]
        if values and all(isinstance(v, Real) for v in values):
            yield label, tuple(float(v) for v in values)  # type: ignore[arg-type]
