"""What a report tells of a model: the metrics that are cheap enough, and a sample of its text."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from slimrank.evaluate.metric import Subject, Text, metrics
from slimrank.evaluate.sample import sample
from slimrank.progress import Progress


def measure_quality(model: Any, tokenizer: Any, windows: Tensor, bos: bool, progress: Progress) -> dict[str, Any]:
    """Measure a model for a report.

    Args:
        model: where it is.
        tokenizer: its tokenizer.
        windows: of tokens (windows x seq_len).
        bos: whether each window begins with a BOS token.
        progress: told of every window.

    Returns:
        The record of every metric that says `in_report` by its id, "perplexity" among them; "sample": how the model
        goes on from the first window.
    """
    text, whole = Text("evaluation", windows, tokenizer, bos, progress), Subject(tokenizer, progress)
    found = {m.id: m.measure(model, text) for m in metrics("text") if m.in_report}
    found |= {m.id: m.measure(model, whole) for m in metrics("model") if m.in_report}
    return {**found, "sample": sample(model, tokenizer, windows[0])}


def reported_metrics() -> list[str]:
    """Return the ids of the metrics that `measure_quality` measures."""
    return [m.id for scope in ("text", "model") for m in metrics(scope) if m.in_report]
