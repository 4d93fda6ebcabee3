"""The suites of texts and tasks that papers report, under their conventions, out of a folder of data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from slimrank.errors import DataError, RecipeError, nearest
from slimrank.evaluate.suite_data import read_text, write_tasks
from slimrank.evaluate.tasks import TaskRequest
from slimrank.evaluate.windows import TextRequest

SEVEN = ("openbookqa", "arc_easy", "winogrande", "hellaswag", "arc_challenge", "piqa", "mathqa")


@dataclass(frozen=True)
class PublishedSuite:
    """What a suite measures.

    Attributes:
        title: where it is from.
        texts: names of texts; perplexity of windows without overlap and without special tokens.
        tasks: of lm-evaluation-harness, each with its own number of examples.
        averaged: those of the tasks whose accuracies are averaged.
        most: text -> its first windows at most.
        seq_len: tokens of a window.
    """

    title: str
    texts: tuple[str, ...]
    tasks: tuple[str, ...]
    averaged: tuple[str, ...]
    most: Mapping[str, int] = field(default_factory=dict)
    seq_len: int = 2048


_ARENA = ("boolq", "arc_easy", "arc_challenge", "winogrande", "piqa", "hellaswag", "openbookqa")
SUITES = {
    "paper": PublishedSuite("papers on SVD compression", ("wikitext2", "ptb", "c4"), SEVEN, SEVEN),
    "svd_llm": PublishedSuite("table 1 of SVD-LLM", ("wikitext2", "c4"), (*SEVEN, "truthfulqa_gen", "gsm8k"), SEVEN),
    "arena": PublishedSuite("LowRankArena", ("wikitext2", "c4"), _ARENA, _ARENA, {"c4": 128}),
}


@dataclass(frozen=True)
class SuiteRequest:
    """Which suite, and how much of it.

    Attributes:
        name: one of `SUITES`.
        data: the folder that texts and questions are read from; see `evaluate.suite_data`.
        limit: first questions of each task; None takes all.
        windows: first windows of each text; None takes all that the suite takes.
        seq_len: tokens of a window; None takes those of the suite.

    Raises:
        RecipeError: there is no such suite.
        DataError: there is no such folder.
    """

    name: str
    data: str | Path
    limit: int | None = None
    windows: int | None = None
    seq_len: int | None = None

    def __post_init__(self) -> None:
        if self.name not in SUITES:
            raise RecipeError(f"there is no suite '{self.name}'.", nearest(self.name, SUITES))
        if not Path(self.data).expanduser().is_dir():
            raise DataError(f"there is no folder '{self.data}'.", "--data-dir: a folder of texts and questions")

    @property
    def suite(self) -> PublishedSuite:
        """What it measures."""
        return SUITES[self.name]

    @contextmanager
    def opened(self) -> Iterator[tuple[TextRequest, TaskRequest]]:
        """Yield the texts and the tasks, which last as long as the context.

        Raises:
            DataError: a text, or the questions of a task, are not in the folder.
        """
        folder = Path(self.data).expanduser()
        texts = {name: read_text(name, folder) for name in self.suite.texts}
        with TemporaryDirectory(prefix="slimrank-tasks-") as place:
            write_tasks(self.suite.tasks, folder, Path(place))
            most = {} if self.windows is not None else self.suite.most
            yield (
                TextRequest(
                    tuple(texts), self.windows, self.seq_len or self.suite.seq_len, given=texts, most=most, bos=False
                ),
                TaskRequest(self.suite.tasks, place, None, self.limit),
            )
