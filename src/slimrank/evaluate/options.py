"""The rarer options of `evaluate` and `benchmark`: how models are loaded, and what else is measured.

Each set of options is stated twice: as the keywords that a function takes, and with its defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from slimrank.evaluate.published import SuiteRequest
from slimrank.evaluate.tasks import TaskRequest
from slimrank.progress import Progress


class LoadOptions(TypedDict, total=False):
    """Keywords about how models are loaded; see `Loading`."""

    device: str
    dtype: str
    progress: Progress | None


class EvaluateOptions(LoadOptions, total=False):
    """Keywords of `evaluate`; see `Evaluation`."""

    tasks: TaskRequest | None
    against: str | Path | None
    chat: bool
    suite: SuiteRequest | None


@dataclass(frozen=True)
class Loading:
    """How models are loaded.

    Attributes:
        device: where to compute.
        dtype: dtype to load models in.
        progress: told what happens.
    """

    device: str = "auto"
    dtype: str = "auto"
    progress: Progress | None = None


@dataclass(frozen=True)
class Evaluation(Loading):
    """The same, and what to measure besides texts.

    Attributes:
        tasks: the tasks to run.
        against: a model of the same tokens to compare with.
        chat: read rows of chats as such.
        suite: a published suite of texts and tasks, instead of others.
    """

    tasks: TaskRequest | None = None
    against: str | Path | None = None
    chat: bool = False
    suite: SuiteRequest | None = None
