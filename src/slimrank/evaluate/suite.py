"""Put models to texts and tasks: one by itself, or one next to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from slimrank.evaluate.agreement import agreement
from slimrank.evaluate.paired import compare_tasks, compare_texts, too_few
from slimrank.evaluate.perplexity import perplexity
from slimrank.evaluate.tasks import TaskResult, Tasks
from slimrank.progress import Progress


@dataclass(frozen=True)
class Material:
    """What models are measured on.

    Attributes:
        texts: windows of tokens (windows x seq_len) by the name of their text.
        bos: whether each window begins with a BOS token.
        tasks: what to ask, if anything.
    """

    texts: Mapping[str, Tensor]
    bos: bool = False
    tasks: Tasks | None = None


def measure(model: Any, tokenizer: Any, material: Material, progress: Progress | None = None) -> dict[str, Any]:
    """What a model, where it is, makes of texts and tasks.

    Returns:
        "texts": a `Perplexity` as a record by text; "tasks": a `TaskResult` as a record by task.

    Raises:
        SlimrankError: see `perplexity` and `Tasks.run`.
    """
    progress = progress or Progress()
    texts = {}
    for source, windows in material.texts.items():
        progress.stage(f"perplexity of {source}", len(windows))
        texts[source] = asdict(perplexity(model, windows, material.bos, progress))
    return {"texts": texts, "tasks": _records(_answers(model, tokenizer, material))}


def compare(
    model: Any, dense: Any, tokenizer: Any, material: Material, progress: Progress | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same for a model next to another of the same tokens, mostly the one that it was made of.

    Returns:
        What `measure` returns for the model; and of the other, "texts": what `compare_texts` returns by text,
        "tasks": what `compare_tasks` returns, "too_few": what `too_few` returns.

    Raises:
        SlimrankError: see `agreement`, `Tasks.run` and `paired`.
    """
    progress = progress or Progress()
    texts, against = {}, {}
    for source, windows in material.texts.items():
        progress.stage(f"both on {source}", len(windows))
        both = agreement(model, dense, windows, material.bos, progress)
        texts[source], against[source] = asdict(both.model), compare_texts(both)
    answers = _answers(model, tokenizer, material)
    differences = compare_tasks(answers, _answers(dense, tokenizer, material))
    other = {"texts": against, "tasks": differences, "too_few": too_few(answers)}
    return {"texts": texts, "tasks": _records(answers)}, other


def _answers(model: Any, tokenizer: Any, material: Material) -> dict[str, TaskResult]:
    return {} if material.tasks is None else material.tasks.run(model, tokenizer)


def _records(answers: Mapping[str, TaskResult]) -> dict[str, Any]:
    return {task: asdict(result) for task, result in answers.items()}
