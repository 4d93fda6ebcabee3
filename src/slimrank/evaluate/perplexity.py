"""Perplexity, one function for the whole project."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.errors import DataError, NonFiniteError
from slimrank.models.contexts import evaluating
from slimrank.processes import Processes, processes
from slimrank.progress import Progress

LARGEST_NLL = 700.0  # exp of more is no float
LOGITS_AT_ONCE = 2**25  # elements of the logits of one forward pass


@dataclass(frozen=True)
class Perplexity:
    """Perplexity and what it was measured on.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per predicted token.
        windows: number of windows, without overlap.
        seq_len: tokens per window; seq_len - 1 of them are predicted.
        tokens: predictions in all.
        bos: whether each window begins with a BOS token.
        nll: mean negative log-likelihood of each window, for paired comparisons.
    """

    perplexity: float
    windows: int
    seq_len: int
    tokens: int
    bos: bool
    nll: tuple[float, ...]


def perplexity(model: Any, windows: Tensor, bos: bool = False, progress: Progress | None = None) -> Perplexity:
    """Measure the perplexity of a model on windows of tokens (windows x seq_len), where the model is.

    Log-probabilities in float32, sums in float64; every window counts alike. Processes share the windows.

    Raises:
        DataError: windows of fewer than two tokens.
        NonFiniteError: NaN or infinity in the logits (names the first layer that makes it), or a perplexity too
            large to be a number.
    """
    check_windows(windows)
    team = processes() if len(windows) >= processes().count else Processes()
    mine = team.mine(range(len(windows)))
    nll = _of_windows(model, windows[list(mine)], mine[0], progress or Progress())
    return summary([each for part in team.all(nll) for each in part], windows, bos)


def _of_windows(model: Any, windows: Tensor, first: int, progress: Progress) -> list[float]:
    """Return the mean negative log-likelihood of each window; `first` is the number of the first one."""
    nll: list[float] = []
    with evaluating(model):
        for ids in windows.split(windows_at_once(model, windows.shape[1])):
            ids = ids.to(next(model.parameters()).device)
            nll += window_nll(model, model(input_ids=ids, use_cache=False).logits, ids, first=first + len(nll))
            progress.step(len(ids))
    return nll


def check_windows(windows: Tensor) -> None:
    """Make sure that windows (windows x seq_len) leave something to predict.

    Raises:
        DataError: they do not.
    """
    count, seq_len = windows.shape
    if seq_len < 2 or count < 1:
        raise DataError(f"{count} windows of {seq_len} tokens leave nothing to predict.", "use --seq-len 2 or more")


def windows_at_once(model: Any, seq_len: int) -> int:
    """Return how many windows to run at a time, so that their logits stay small; at least one."""
    vocabulary = model.get_output_embeddings().weight.shape[0] if model.get_output_embeddings() else 2**16
    return max(1, LOGITS_AT_ONCE // (seq_len * vocabulary))


def window_nll(model: nn.Module, logits: Tensor, ids: Tensor, first: int) -> list[float]:
    """Return the mean negative log-likelihood of each window of `ids`; `first` is the number of the first window.

    Raises:
        NonFiniteError: NaN or infinity in the logits.
    """
    means = []
    for row, targets in zip(logits, ids, strict=True):
        z = row[:-1].float()  # not cross_entropy: its float32 exp is 2e-5 nats off on some processors
        losses = z.logsumexp(dim=-1) - z.gather(1, targets[1:, None])[:, 0]
        means.append(float(losses.cpu().double().mean()))
    for offset, mean in enumerate(means):
        if not math.isfinite(mean):
            where = first_nonfinite_layer(model, ids)
            raise NonFiniteError(
                f"NaN or infinity in the logits of window {first + offset}; it first appears in '{where}'.",
                "evaluate in float32 (--dtype float32)",
            )
    return means


def summary(nll: list[float], windows: Tensor, bos: bool) -> Perplexity:
    """Return the perplexity of windows whose mean negative log-likelihoods are known.

    Raises:
        NonFiniteError: it is too large to be a number.
    """
    count, seq_len = windows.shape
    mean = math.fsum(nll) / count
    if mean > LARGEST_NLL:
        raise NonFiniteError(
            f"the perplexity is beyond any number: {mean:.0f} nats a token.",
            "the model is broken (keep more); compress --no-eval writes it without measuring",
        )
    return Perplexity(math.exp(mean), count, seq_len, count * (seq_len - 1), bos, tuple(nll))


def first_nonfinite_layer(model: nn.Module, ids: Tensor) -> str:
    """Return the path of the first leaf module whose output holds NaN or infinity; "the logits" if none does."""
    found: list[str] = []

    def hook(name: str) -> Any:
        def observe(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not found and not bool(torch.isfinite(output).all()):
                found.append(name)

        return observe

    leaves = [(name, m) for name, m in model.named_modules() if not any(True for _ in m.children())]
    handles = [m.register_forward_hook(hook(name)) for name, m in leaves]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the logits"
