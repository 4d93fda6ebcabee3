"""The contract of a metric: one figure of a model, in a file of its own.

A metric from outside the package registers itself with `@metric`. `evaluate` and `compare` measure it then, and so does
`compress`, before and after, if it says `in_report`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar

from torch import Tensor

from slimrank.errors import NonFiniteError
from slimrank.evaluate.agreement import Agreement, agreement
from slimrank.evaluate.tasks import Tasks
from slimrank.progress import Progress
from slimrank.registry import Registry

Record = dict[str, Any]
Scope = Literal["text", "model"]
TAKEN = {  # fields of records that are not metrics
    "against", "bytes", "device", "dtype", "environment", "model", "notes", "parameters", "peak_memory", "sample",
    "speed", "task_settings", "texts", "tokens_sha256", "too_few",
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """What a metric of the whole model is measured with.

    Attributes:
        tokenizer: of the models.
        progress: told what happens.
        tasks: the tasks to run, if any.
    """

    tokenizer: Any
    progress: Progress = field(default_factory=Progress)
    tasks: Tasks | None = None


@dataclass(frozen=True)
class Text:
    """One text that models are measured on.

    Attributes:
        name: of the text.
        windows: of tokens (windows x seq_len).
        tokenizer: of the models.
        bos: whether each window begins with a BOS token.
        progress: told of every window.
    """

    name: str
    windows: Tensor
    tokenizer: Any
    bos: bool = False
    progress: Progress = field(default_factory=Progress)
    _seen: list[tuple[Any, Any, Agreement]] = field(default_factory=list, repr=False, compare=False)

    def agreement(self, model: Any, dense: Any) -> Agreement:
        """Compare two models on the text: one pass through each, however many metrics ask."""
        for known, other, found in self._seen:
            if known is model and other is dense:
                return found
        found = agreement(model, dense, self.windows, self.bos, self.progress)
        self._seen.append((model, dense, found))
        return found


@dataclass(frozen=True)
class Compared:
    """A model beside the one that it was made of.

    Attributes:
        own: what `measure` returns for the model; None for a metric that only compares.
        against: the fields that the metric adds to the record of the comparison.
    """

    own: Record | None
    against: Record


On = TypeVar("On", Text, Subject)


class Metric(Generic[On]):
    """One figure of a model. A subclass states what it is and computes `value`.

    Attributes:
        id: its name in records.
        title: its name for people.
        unit: of its value; empty if it has none.
        better: which values are better.
        in_report: whether `compress` measures it, before and after; it should take no longer than perplexity.
        alone: whether it can measure a model without another beside it.
        scope: whether it is measured on each text, or once for the whole model.
    """

    id: ClassVar[str]
    title: ClassVar[str]
    unit: ClassVar[str] = ""
    better: ClassVar[Literal["lower", "higher"]]
    in_report: ClassVar[bool] = False
    alone: ClassVar[bool] = True
    scope: ClassVar[Scope]

    def value(self, model: Any, on: On) -> float:
        """Compute the value for a model, where it is; for metrics that leave `measure` as it is."""
        raise NotImplementedError

    def measure(self, model: Any, on: On) -> Record:
        """Return the record of a model: the value, and what it means.

        Raises:
            NonFiniteError: the value is not a finite number.
        """
        value = float(self.value(model, on))
        if not math.isfinite(value):
            raise NonFiniteError(f"the {self.title} is {value}.", "evaluate in float32 (--dtype float32)")
        return {"value": value, "title": self.title, "unit": self.unit, "better": self.better}

    def compare(self, model: Any, dense: Any, on: On) -> Compared:
        """Measure a model and the one that it was made of; by default one after the other."""
        own, other = self.measure(model, on), self.measure(dense, on)
        return Compared(own, {self.id: {**other, "difference": own["value"] - other["value"]}})

    def fields(self, found: Record) -> Record:
        """Return the fields that a measurement adds to the record of a text or model; by default one, the id."""
        return {self.id: found}


class TextMetric(Metric[Text]):
    """A metric of a model on one text."""

    scope = "text"


class ModelMetric(Metric[Subject]):
    """A metric of a model that needs no text, or has questions of its own."""

    scope = "model"


METRICS: Registry[Metric[Any]] = Registry("slimrank.evaluate.metrics", "metric")

M = TypeVar("M", bound=type[Metric[Any]])


def metric(kind: M) -> M:
    """Register a class of metrics; use it as a decorator.

    Raises:
        ValueError: records have another field of this name.
    """
    if kind.id in TAKEN:
        raise ValueError(f"a metric cannot be called '{kind.id}': records have such a field")
    METRICS.add(kind())
    return kind


def metrics(scope: Scope) -> list[Metric[Any]]:
    """Return all metrics of a scope, those that measure a model by itself first."""
    return sorted((found for found in METRICS.all().values() if found.scope == scope), key=lambda m: not m.alone)


def measured(scope: Scope, model: Any, on: Text | Subject) -> Record:
    """Return the record of a model on one text, or as a whole: the fields of all metrics."""
    alone = [m for m in metrics(scope) if m.alone]
    return _merged((m, m.fields(m.measure(model, on))) for m in alone)


def compared(scope: Scope, model: Any, dense: Any, on: Text | Subject) -> tuple[Record, Record]:
    """Return the same for a model beside another, and the record of the comparison."""
    found = [(m, m.compare(model, dense, on)) for m in metrics(scope)]
    own = _merged((m, m.fields(some.own)) for m, some in found if some.own is not None)
    return own, _merged((m, some.against) for m, some in found)


def _merged(parts: Iterable[tuple[Metric[Any], Record]]) -> Record:
    """Put the fields of metrics into one record.

    Raises:
        ValueError: two metrics have a field of the same name.
    """
    record: Record = {}
    for metric, fields in parts:
        if twice := record.keys() & fields.keys():
            raise ValueError(f"the metric '{metric.id}' repeats the fields {sorted(twice)} of another")
        record |= fields
    return record
