"""Evaluate models by name: texts, tasks, speed, memory, a sample. What `slimrank evaluate` and `benchmark` run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimrank.errors import DataError, ModelError, RecipeError
from slimrank.evaluate.memory import peak_memory
from slimrank.evaluate.paired import LEAST, check_windows
from slimrank.evaluate.sample import sample
from slimrank.evaluate.speed import measure_speed, measure_speeds
from slimrank.evaluate.suite import Material, compare, measure
from slimrank.evaluate.tasks import TaskRequest, Tasks
from slimrank.models.load import load_model
from slimrank.models.placement import placed, resolve_device
from slimrank.models.storage import saved_bytes
from slimrank.models.structure import parameters_of
from slimrank.progress import Progress
from slimrank.text.sources import read_source
from slimrank.text.texts import window_length
from slimrank.text.tokens import bos_of, check_tokens, tokenise
from slimrank.text.windows import count_windows, leading_windows, tokens_digest


def evaluate(
    model: str | Path,
    texts: Sequence[str] | None = None,
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
        texts: sources (see `calibration.sources`); None takes "demo", or no text if tasks are given.
        windows: first windows of each text; None takes all.
        seq_len: tokens per window; None takes 512 or the model's context.
        device: where to compute.
        dtype: dtype to load the model in.
        progress: told what happens.
        tasks: what to ask besides.
        against: a model of the same tokens to compare with, mostly the one that this one was made of.

    Returns:
        A record. "texts" holds the perplexity of each text, and "perplexity" that of the first; None without a text.
        "tasks" holds the result of each task, "task_settings" what was asked, "against" the comparison (see
        `evaluate.material`); the last two are None where not wanted. "notes" name what was skipped or changed.

    Raises:
        SlimrankError: an unreadable text, an unknown model or task, models of different tokens, one window to compare
            models on, windows without a text, non-finite logits.
    """
    progress = progress or Progress()
    named = _texts_of(texts, tasks, windows, seq_len)
    if against is not None:
        check_windows(windows)
    place = resolve_device(device)
    sources, notes = _read(named or ("demo",), progress)
    suite = None if tasks is None else Tasks(tasks, progress)
    read = load_model(model, dtype, progress)
    loaded, tokenizer = read.model, read.tokenizer
    notes += read.notes
    length = window_length(loaded, seq_len)
    least = 1 if against is None else LEAST
    wanted = windows if named else 1  # without a text, for the sample and to compare tokenizers
    cut = {
        source: windows_of(source, text, loaded, tokenizer, wanted, length, least) for source, text in sources.items()
    }
    dense = None if against is None else _load_dense(against, dtype, progress, sources, cut, notes)
    material = Material(cut if named else {}, bos_of(tokenizer) is not None, suite)
    with placed([loaded] if dense is None else [loaded, dense], place, upcast=False):
        if dense is None:
            measured, compared = measure(loaded, tokenizer, material, progress), None
        else:
            measured, differences = compare(loaded, dense, tokenizer, material, progress)
            compared = {"model": str(against), "parameters": parameters_of(dense), **differences}
        speed = measure_speed(loaded)
        text = sample(loaded, tokenizer, next(iter(cut.values()))[0])
    for source, ids in material.texts.items():
        measured["texts"][source]["tokens_sha256"] = tokens_digest(ids)
    first = next(iter(measured["texts"].values()), None)
    return {
        "model": str(model),
        "perplexity": None if first is None else first["perplexity"],
        **measured,
        "notes": notes,
        "task_settings": None if suite is None else suite.described(),
        "against": compared,
        "speed": asdict(speed),
        "sample": text,
        "peak_memory": peak_memory(place),
        "parameters": parameters_of(loaded),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": str(place),
    }


def _read(names: Sequence[str], progress: Progress) -> tuple[dict[str, str], list[str]]:
    """Read texts by the names of their sources; name what reading skipped or changed."""
    notes: list[str] = []
    texts = {name: read_source(name, "evaluation", notes.append) for name in names}
    for note in notes:
        progress.note(note)
    return texts, notes


def _load_dense(
    spec: str | Path,
    dtype: str,
    progress: Progress,
    sources: Mapping[str, str],
    cut: Mapping[str, Tensor],
    notes: list[str],
) -> Any:
    """Load the model to compare with, which must read the texts as the same windows of tokens; add to the notes.

    Raises:
        ModelError: it does not.
    """
    read = load_model(spec, dtype, progress)
    dense, tokenizer = read.model, read.tokenizer
    notes += [f"{spec}: {note}" for note in read.notes]
    for source, windows in cut.items():
        window_length(dense, windows.shape[1])
        own = windows_of(source, sources[source], dense, tokenizer, len(windows), windows.shape[1])
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
        A record with "model", "against" (each: speed, parameters, bytes), "ratios" (model over against) and "notes".
    """
    place = resolve_device(device)
    read = [load_model(spec, dtype, progress) for spec in (model, against)]
    loaded = [each.model for each in read]
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
        "notes": [f"{spec}: {note}" for spec, each in zip((model, against), read, strict=True) for note in each.notes],
        "device": str(place),
        "peak_memory": peak_memory(place),
    }


def windows_of(
    source: str, text: str, model: Any, tokenizer: Any, windows: int | None, seq_len: int, least: int = 1
) -> Tensor:
    """Cut the first windows of a text (windows x seq_len); without a number all, and at least `least`.

    Raises:
        DataError: the text, named by its source, is too short.
        ModelError: it holds tokens that the model has no embedding for.
    """
    bos = bos_of(tokenizer)
    tokens = tokenise(text, tokenizer, most=None if windows is None else windows * seq_len)
    check_tokens(tokens, tokenizer, model)
    try:
        return leading_windows(tokens, windows or max(least, count_windows(tokens, seq_len, bos)), seq_len, bos)
    except DataError as error:
        raise DataError(f"'{source}': {error.message}", error.hint) from error


def _texts_of(
    texts: Sequence[str] | None, tasks: TaskRequest | None, windows: int | None, seq_len: int | None
) -> Sequence[str]:
    """Name the texts to measure: those given, or the demo text if nothing else is asked for.

    Raises:
        RecipeError: an option about texts, and no text.
    """
    named = texts if texts is not None else ("demo",) if tasks is None else ()
    for option, value in {"--windows": windows, "--seq-len": seq_len}.items():
        if value is not None and not named:
            raise RecipeError(f"{option} is about text, and none is named.", "--text demo, or a file of your own")
    return named
