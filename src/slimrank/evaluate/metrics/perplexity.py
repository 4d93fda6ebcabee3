"""Perplexity, with the interval of its ratio to that of another model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from slimrank.evaluate.metric import Compared, Record, Text, TextMetric, metric
from slimrank.evaluate.paired import compare_perplexities
from slimrank.evaluate.perplexity import perplexity


@metric
class PerplexityMetric(TextMetric):
    """exp of the mean negative log-likelihood per predicted token.

    The record of a text is that of its perplexity; other metrics add fields to it.
    """

    id, title, better, in_report = "perplexity", "perplexity", "lower", True

    def measure(self, model: Any, on: Text) -> Record:
        """Return a `Perplexity` as a record."""
        return asdict(perplexity(model, on.windows, on.bos, on.progress))

    def compare(self, model: Any, dense: Any, on: Text) -> Compared:
        """Return what `compare_perplexities` returns."""
        both = on.agreement(model, dense)
        return Compared(asdict(both.model), compare_perplexities(both.model, both.dense))

    def fields(self, found: Record) -> Record:
        """Return all fields of the perplexity."""
        return found
