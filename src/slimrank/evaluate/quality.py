"""What a model makes of a text: its perplexity, and a sample of how it goes on."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor

from slimrank.evaluate.perplexity import perplexity
from slimrank.evaluate.sample import sample
from slimrank.progress import Progress


def measure_quality(model: Any, tokenizer: Any, windows: Tensor, bos: bool, progress: Progress) -> dict[str, Any]:
    """Perplexity on windows of text, and a sample that goes on from the first of them."""
    return {
        "perplexity": asdict(perplexity(model, windows, bos, progress)),
        "sample": sample(model, tokenizer, windows[0]),
    }
