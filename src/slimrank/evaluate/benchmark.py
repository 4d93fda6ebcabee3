"""Speed and size of a model against another, what `slimrank benchmark` runs."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binom
from torch import Tensor
from typing_extensions import Unpack

from slimrank.errors import RecipeError, nearest
from slimrank.evaluate.busy import check_idle, others
from slimrank.evaluate.engine import CACHES, ENGINES, Engine, Round, Running
from slimrank.evaluate.memory import peak_memory
from slimrank.evaluate.options import Loading, LoadOptions
from slimrank.evaluate.speed import VOCABULARY_USED
from slimrank.models.placement import resolve_device
from slimrank.progress import Progress

CONFIDENCE = 0.95


class BenchmarkOptions(LoadOptions, total=False):
    """Keywords of `benchmark`; see `Benchmark`."""

    batches: Sequence[int]
    prompts: Sequence[int]
    new_tokens: int
    repeats: int
    engine: str
    cache: str
    busy: bool


@dataclass(frozen=True)
class Benchmark(Loading):
    """What is measured.

    Attributes:
        batches: texts that are generated at once.
        prompts: tokens of the prompt.
        new_tokens: tokens to generate in a round.
        repeats: rounds that count; one before them does not.
        engine: what runs the models; see `slimrank benchmark --help`.
        cache: what keeps keys and values: "dynamic", as transformers does; "latent" or "latent-int8": see
            `slimrank.latent_cache`.
        busy: measure although other processes keep the machine busy.
    """

    batches: Sequence[int] = (1,)
    prompts: Sequence[int] = (32, 512)
    new_tokens: int = 64
    repeats: int = 5
    engine: str = "transformers"
    cache: str = "dynamic"
    busy: bool = False


def benchmark(model: str | Path, against: str | Path, **options: Unpack[BenchmarkOptions]) -> dict[str, Any]:
    """Measure speed and size of a model against another, turn by turn in one process.

    Args:
        model: hub id, local folder, GGUF file, or "demo".
        against: the same, usually of the original.
        options: see `Benchmark`, and `device`, `dtype` and `progress` in `Loading`.

    Returns:
        A record. "rows": for each batch and prompt the tokens per second of both in prefill and decoding (medians),
        bytes of their caches, and "ratios" (model over against: median, and the 95 % interval of the median by order
        statistics; with fewer than six rounds, which allow none, the extremes). "model" and "against": parameters,
        bytes of the weights, dtype, and "kv_bytes" (what caches of one text take, as `models.kv_bytes` counts it).
        "ratios": of parameters and bytes. "machine": what computed. "others": processors that other processes kept
        busy. "notes".

    Raises:
        SlimrankError: a model that cannot be read, an unknown engine, or a machine that is too busy.
        TypeError: an unknown option.
    """
    asked = Benchmark(**options)
    if asked.cache not in CACHES:
        raise RecipeError(f"there is no cache '{asked.cache}'.", nearest(asked.cache, CACHES))
    engine: Engine = ENGINES.get(asked.engine)()
    if not asked.busy:
        check_idle()
    place, progress = resolve_device(asked.device), asked.progress or Progress()
    both = [engine.load(spec, asked) for spec in (model, against)]
    for running in both:
        running.use_cache(asked.cache)
    asked, shortened = _within_context(asked, [running.context for running in both if running.context is not None])
    settings = [(batch, prompt) for prompt in asked.prompts for batch in asked.batches]
    progress.stage("measure", len(settings) * (asked.repeats + 1))
    with others() as found:
        rows = [_row(both, setting, asked, progress) for setting in settings]
    ours, theirs = (_side(running) for running in both)
    return {
        "model": ours,
        "against": theirs,
        "rows": rows,
        "ratios": {key: ours[key] / theirs[key] for key in ("parameters", "bytes")},
        "engine": asked.engine,
        "cache": asked.cache,
        "device": str(place),
        "machine": {**_machine(), **engine.versions()},
        "others": found.processors,
        "notes": [*shortened, *(f"{each.name}: {note}" for each in both for note in each.notes)],
        "peak_memory": peak_memory(place),
    }


def median_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and the ends of its interval of 95 %, by order statistics; the extremes of a few values."""
    ordered, n = sorted(values), len(values)
    outside = (k for k in range(n // 2) if 2 * binom.cdf(k, n, 0.5) <= 1 - CONFIDENCE)  # values at each end
    first = max(outside, default=0)
    return statistics.median(ordered), ordered[first], ordered[n - 1 - first]


def _row(both: list[Running], setting: tuple[int, int], asked: Benchmark, progress: Progress) -> dict[str, Any]:
    """Measure both models in turns for one batch and prompt."""
    batch, prompt = setting
    rounds = list(_rounds(both, _prompts(both, batch, prompt), asked, progress))
    read, made = batch * prompt, batch * asked.new_tokens
    return {
        "batch": batch,
        "prompt": prompt,
        "new_tokens": asked.new_tokens,
        **{
            name: {
                "prefill": read / statistics.median(pair[side].prefill for pair in rounds),
                "decode": made / statistics.median(pair[side].decode for pair in rounds),
                "cache_bytes": rounds[-1][side].cache_bytes,
            }
            for side, name in enumerate(("model", "against"))
        },
        "ratios": {
            "prefill": median_and_interval(_ratios(rounds, lambda each: each.prefill)),
            "decode": median_and_interval(_ratios(rounds, lambda each: each.decode)),
        },
    }


def _rounds(both: list[Running], ids: Tensor, asked: Benchmark, progress: Progress) -> Iterator[tuple[Round, Round]]:
    """Yield the rounds that count; who begins changes from one to the next."""
    for turn in range(asked.repeats + 1):
        order = (0, 1) if turn % 2 else (1, 0)
        found = {side: both[side].round(ids, asked.new_tokens) for side in order}
        progress.step()
        if turn:
            yield found[0], found[1]


def _ratios(rounds: list[tuple[Round, Round]], seconds: Callable[[Round], float]) -> list[float]:
    """Return how many times as fast the first model was, round by round."""
    return [seconds(theirs) / seconds(ours) for ours, theirs in rounds]


def _prompts(both: list[Running], batch: int, prompt: int) -> Tensor:
    vocabulary = min(VOCABULARY_USED, *(running.vocabulary for running in both))
    return torch.randint(vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(0))


def _within_context(asked: Benchmark, contexts: Sequence[int]) -> tuple[Benchmark, list[str]]:
    """Shorten new tokens and prompts to what the smallest context holds; say so."""
    room = min(contexts, default=None)
    if room is None or max(asked.prompts) + asked.new_tokens <= room:
        return asked, []
    new = min(asked.new_tokens, room // 2)
    prompts = list(dict.fromkeys(min(prompt, room - new) for prompt in asked.prompts))
    note = f"the context holds {room} tokens: measured are prompts of {prompts} and {new} new tokens"
    return replace(asked, prompts=prompts, new_tokens=new), [note]


def _side(running: Running) -> dict[str, Any]:
    names = ("name", "dtype", "parameters", "kv_bytes")
    return {**{name: getattr(running, name) for name in names}, "bytes": running.weight_bytes}


def _machine() -> dict[str, Any]:
    return {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
