"""Measure models on texts and tasks by all metrics: one by itself, or one beside another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from slimrank.evaluate.metric import Record, Subject, Text, compared, measured, metrics
from slimrank.evaluate.tasks import Tasks
from slimrank.progress import Progress


@dataclass(frozen=True)
class Suite:
    """What models are measured on.

    Attributes:
        texts: windows of tokens (windows x seq_len) by the name of their text.
        bos: whether each window begins with a BOS token.
        tasks: the tasks to run, if any.
    """

    texts: Mapping[str, Tensor]
    bos: bool = False
    tasks: Tasks | None = None

    def each(self, tokenizer: Any, progress: Progress) -> list[Text]:
        """Return the texts as metrics take them."""
        return [Text(name, windows, tokenizer, self.bos, progress) for name, windows in self.texts.items()]


def measure(model: Any, tokenizer: Any, suite: Suite, progress: Progress | None = None) -> Record:
    """Measure a model, where it is, by all metrics.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        suite: the texts and tasks.
        progress: told what happens.

    Returns:
        "texts": the record of each text, a `Perplexity` with the fields of other metrics; and a field for each metric
        of the whole model: "tasks", a `TaskResult` as a record by task.

    Raises:
        SlimrankError: see `perplexity` and `Tasks.run`.
    """
    progress = progress or Progress()
    texts = {}
    for text in suite.each(tokenizer, progress):
        titles = [m.title for m in metrics("text") if m.alone]
        progress.stage(f"{', '.join(titles)} of {text.name}", len(titles) * len(text.windows))
        texts[text.name] = measured("text", model, text)
    return {"texts": texts, **measured("model", model, Subject(tokenizer, progress, suite.tasks))}


def compare(
    model: Any, dense: Any, tokenizer: Any, suite: Suite, progress: Progress | None = None
) -> tuple[Record, Record]:
    """Measure a model beside another of the same tokens, usually the one that it was made of.

    Args:
        model: the model.
        dense: the other.
        tokenizer: of both.
        suite: the texts and tasks.
        progress: told what happens.

    Returns:
        What `measure` returns for the model; and of the other, "texts": what `compare_perplexities` returns by text,
        with "kl", "top1" (see `Agreement`) and the fields of other metrics; "tasks": what `compare_tasks` returns,
        "too_few": what `too_few` returns.

    Raises:
        SlimrankError: see `agreement`, `Tasks.run` and `paired`.
    """
    progress = progress or Progress()
    texts, against = {}, {}
    for text in suite.each(tokenizer, progress):
        progress.stage(f"both on {text.name}", len(text.windows))
        texts[text.name], against[text.name] = compared("text", model, dense, text)
    own, other = compared("model", model, dense, Subject(tokenizer, progress, suite.tasks))
    return {"texts": texts, **own}, {"texts": against, **other}


def gains(before: Record, after: Record) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return headings and a row for each text: perplexity over the original's, and the divergence from it.

    Args:
        before: "texts" of what `compare` returns of the original, before a model was changed.
        after: the same after it.
    """
    rows = []
    for text, found in before.items():
        numbers = [f"{side[key]:.4f}" for key in ("ratio", "kl") for side in (found, after[text])]
        rows.append((text, *numbers))
    return ("text", "perplexity ratio before", "after", "KL before", "after"), rows
