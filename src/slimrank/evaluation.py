"""Evaluate models by name: texts, tasks, speed, memory, a sample. What `slimrank evaluate` and `benchmark` run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimrank.calibration.sources import read_source
from slimrank.calibration.windows import bos_of, count_windows, leading_windows, tokenise, tokens_digest
from slimrank.errors import DataError, ModelError
from slimrank.evaluate.material import Material, compare, measure
from slimrank.evaluate.memory import peak_memory
from slimrank.evaluate.paired import LEAST, check_windows
from slimrank.evaluate.sample import sample
from slimrank.evaluate.speed import measure_speed, measure_speeds
from slimrank.evaluate.tasks import TaskRequest, Tasks
from slimrank.inputs import window_length
from slimrank.models.load import load
from slimrank.models.placement import placed, resolve_device
from slimrank.models.storage import saved_bytes
from slimrank.models.structure import parameters_of
from slimrank.progress import Progress


def evaluate(
    model: str | Path,
    texts: Sequence[str] = ("demo",),
    windows: int | None = None,
    seq_len: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
    tasks: TaskRequest | None = None,
    against: str | Path | None = None,
) -> dict[str, Any]:
    """Perplexity on each text, tasks, speed, a sample and peak memory of a saved model.

    Args:
        model: hub id, local folder, GGUF file, or "demo".
        texts: sources (see `calibration.sources`).
        windows: first windows of each text; None takes all.
        seq_len: tokens per window; None takes 512 or the model's context.
        device: where to compute.
        dtype: dtype to load the model in.
        progress: told what happens.
        tasks: what to ask besides.
        against: a model of the same tokens to compare with, mostly the one that this one was made of.

    Returns:
        A record; with one text its perplexity stands under "perplexity", with several each text's stands under
        "texts" and "perplexity" is that of the first. "tasks" holds the result of each task, "task_settings" what was
        asked, "against" the comparison (see `evaluate.material`); the last two are None where not wanted.

    Raises:
        SlimrankError: an unreadable text, an unknown model or task, models of different tokens, one window to compare
            models on, non-finite logits.
    """
    progress = progress or Progress()
    if against is not None:
        check_windows(windows)
    place = resolve_device(device)
    sources = {source: read_source(source, "evaluation") for source in texts}
    suite = None if tasks is None else Tasks(tasks, progress)
    loaded, tokenizer = load(model, dtype, progress)
    length = window_length(loaded, seq_len)
    bos = bos_of(tokenizer)
    least = 1 if against is None else LEAST
    cut = {source: windows_of(source, text, tokenizer, windows, length, bos, least) for source, text in sources.items()}
    dense = None if against is None else _load_dense(against, dtype, progress, sources, cut)
    material = Material(cut, bos is not None, suite)
    with placed([loaded] if dense is None else [loaded, dense], place, upcast=False):
        if dense is None:
            measured, compared = measure(loaded, tokenizer, material, progress), None
        else:
            measured, differences = compare(loaded, dense, tokenizer, material, progress)
            compared = {"model": str(against), "parameters": parameters_of(dense), **differences}
        speed = measure_speed(loaded)
        text = sample(loaded, tokenizer, next(iter(cut.values()))[0])
    for source, ids in cut.items():
        measured["texts"][source]["tokens_sha256"] = tokens_digest(ids)
    first = next(iter(measured["texts"].values()))
    return {
        "model": str(model),
        "perplexity": first["perplexity"],
        **measured,
        "task_settings": None if suite is None else suite.described(),
        "against": compared,
        "speed": asdict(speed),
        "sample": text,
        "peak_memory": peak_memory(place),
        "parameters": parameters_of(loaded),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": str(place),
    }


def _load_dense(
    spec: str | Path, dtype: str, progress: Progress, sources: Mapping[str, str], cut: Mapping[str, Tensor]
) -> Any:
    """The model to compare with, which must read the texts as the same windows of tokens.

    Raises:
        ModelError: it does not.
    """
    dense, tokenizer = load(spec, dtype, progress)
    bos = bos_of(tokenizer)
    for source, windows in cut.items():
        window_length(dense, windows.shape[1])
        own = windows_of(source, sources[source], tokenizer, len(windows), windows.shape[1], bos)
        if not torch.equal(own, windows):
            raise ModelError(
                f"'{spec}' reads '{source}' as other tokens than the model does.",
                "compare a model with the one that it was made of",
            )
    return dense


def benchmark(
    model: str | Path,
    against: str | Path,
    prompt: int = 256,
    new_tokens: int = 32,
    repeats: int = 5,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Speed and size of a model against another, measured turn by turn in one process.

    Returns:
        A record with "model", "against" (each: speed, parameters, bytes) and "ratios" (model over against).
    """
    place = resolve_device(device)
    loaded = [load(spec, dtype, progress)[0] for spec in (model, against)]
    if progress:
        progress.note(f"measuring both turn by turn, {repeats} rounds of {prompt} + {new_tokens} tokens")
    with placed(loaded, place, upcast=False):
        speeds = measure_speeds(loaded, prompt, new_tokens, repeats)
    sides = [
        {
            **asdict(speed),
            "name": str(name),
            "parameters": parameters_of(m),
            "bytes": saved_bytes(m),
            "dtype": str(m.dtype).removeprefix("torch."),
        }
        for name, m, speed in zip((model, against), loaded, speeds, strict=True)
    ]
    keys = ("prefill", "decode", "parameters", "bytes")
    return {
        "model": sides[0],
        "against": sides[1],
        "ratios": {key: sides[0][key] / sides[1][key] for key in keys},
        "device": str(place),
        "peak_memory": peak_memory(place),
    }


def windows_of(
    source: str, text: str, tokenizer: Any, windows: int | None, seq_len: int, bos: int | None, least: int = 1
) -> Tensor:
    """The first windows of a text (windows x seq_len); without a number all, and at least `least`.

    Raises:
        DataError: the text, named by its source, is too short.
    """
    tokens = tokenise(text, tokenizer)
    try:
        return leading_windows(tokens, windows or max(least, count_windows(tokens, seq_len, bos)), seq_len, bos)
    except DataError as error:
        raise DataError(f"'{source}': {error.message}", error.hint) from error
