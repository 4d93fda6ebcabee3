"""Speed and size of a model against another, what `slimrank benchmark` runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from slimrank.evaluate.memory import peak_memory
from slimrank.evaluate.options import Loading, LoadOptions
from slimrank.evaluate.speed import Speed, measure_speeds
from slimrank.models.load import load_model
from slimrank.models.placement import placed, resolve_device
from slimrank.models.storage import saved_bytes
from slimrank.models.structure import parameters_of

COMPARED = ("prefill", "decode", "parameters", "bytes")


def benchmark(
    model: str | Path,
    against: str | Path,
    prompt: int = 256,
    new_tokens: int = 32,
    repeats: int = 5,
    **options: Unpack[LoadOptions],
) -> dict[str, Any]:
    """Measure speed and size of a model against another, turn by turn in one process.

    Args:
        model: hub id, local folder, GGUF file, or "demo".
        against: the same, usually of the original.
        prompt: tokens of the prompt.
        new_tokens: tokens to generate per round.
        repeats: number of rounds; the median is reported.
        options: `device`, `dtype` and `progress`, see `Loading`.

    Returns:
        A record with "model", "against" (each: speed, parameters, bytes), "ratios" (model over against) and "notes".

    Raises:
        SlimrankError: a model that cannot be read.
        TypeError: an unknown option.
    """
    loading = Loading(**options)
    place, names = resolve_device(loading.device), (model, against)
    read = [load_model(spec, loading.dtype, loading.progress) for spec in names]
    loaded = [each.model for each in read]
    if loading.progress:
        loading.progress.note(f"measuring both turn by turn, {repeats} rounds of {prompt} + {new_tokens} tokens")
    with placed(loaded, place, upcast=False):
        speeds = measure_speeds(loaded, prompt, new_tokens, repeats)
    ours, theirs = (_side(*side) for side in zip(names, loaded, speeds, strict=True))
    return {
        "model": ours,
        "against": theirs,
        "ratios": {key: ours[key] / theirs[key] for key in COMPARED},
        "notes": [f"{spec}: {note}" for spec, each in zip(names, read, strict=True) for note in each.notes],
        "device": str(place),
        "peak_memory": peak_memory(place),
    }


def _side(name: str | Path, model: Any, speed: Speed) -> dict[str, Any]:
    return {
        **asdict(speed),
        "name": str(name),
        "parameters": parameters_of(model),
        "bytes": saved_bytes(model),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
