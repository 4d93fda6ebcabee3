"""The source `self`: calibration text that the model samples from itself. No data needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimrank.errors import DataError, NonFiniteError
from slimrank.models.cache import next_inputs
from slimrank.models.contexts import evaluating
from slimrank.progress import Progress
from slimrank.text.tokens import check_tokens

MAX_WINDOWS_AT_ONCE = 64  # windows at a time; keys and values of all their tokens are in memory


def sample_windows(
    model: Any, tokenizer: Any, samples: int, seq_len: int, seed: int, progress: Progress | None = None
) -> Tensor:
    """Sample windows from the model at temperature 1 (samples x seq_len), reproducible from the seed.

    Each begins with the BOS token (the EOS token if there is no BOS). Sampling continues after an EOS, as in a
    stream of documents.

    Raises:
        DataError: a tokenizer with neither BOS nor EOS.
        ModelError: the model has no embedding for it.
        NonFiniteError: NaN or infinity in the logits.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise DataError("the tokenizer has neither a BOS nor an EOS token to begin a text with.", "give a text file")
    progress = progress or Progress()
    check_tokens(torch.tensor([first]), tokenizer, model)
    starts = torch.full((samples, 1), first, dtype=torch.long).split(MAX_WINDOWS_AT_ONCE)
    progress.stage("sample", seq_len * len(starts))
    generator = torch.Generator().manual_seed(seed)
    with evaluating(model):
        return torch.cat([_continued(model, start, seq_len, generator, progress) for start in starts])


def _continued(model: Any, windows: Tensor, seq_len: int, generator: torch.Generator, progress: Progress) -> Tensor:
    windows = windows.to(next(model.parameters()).device)
    inputs = {"input_ids": windows}
    while windows.shape[1] < seq_len:
        output = model(**inputs, use_cache=True)
        windows = torch.cat([windows, _draw(output.logits[:, -1], generator).to(windows.device)], dim=1)
        inputs = next_inputs(model, output, windows)
        progress.step()
    return windows.cpu()


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    logits = logits.float().cpu()
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteError("NaN or infinity in the logits while sampling text.", "load the model in float32")
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
