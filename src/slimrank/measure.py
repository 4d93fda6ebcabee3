"""All measurements of one model, as a record for the report."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor

from slimrank.evaluate.memory import peak_memory
from slimrank.evaluate.perplexity import perplexity
from slimrank.evaluate.sample import sample
from slimrank.evaluate.speed import measure_speed
from slimrank.progress import Progress


def measure(model: Any, tokenizer: Any, windows: Tensor | None, bos: bool, progress: Progress) -> dict[str, Any]:
    """Perplexity, speed, a sample and peak memory; {} when there is no evaluation text."""
    if windows is None:
        return {}
    return {
        "perplexity": asdict(perplexity(model, windows, bos, progress)),
        "speed": asdict(measure_speed(model)),
        "sample": sample(model, tokenizer, windows[0]),
        "peak_memory": peak_memory(),
    }
