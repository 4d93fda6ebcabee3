"""Evaluate models by name: texts, tasks, speed, memory, a sample. What `slimrank evaluate` and `benchmark` run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from slimrank.errors import ModelError, RecipeError
from slimrank.evaluate.benchmark import benchmark
from slimrank.evaluate.memory import peak_memory
from slimrank.evaluate.options import EvaluateOptions, Evaluation
from slimrank.evaluate.paired import MIN_ITEMS, check_windows
from slimrank.evaluate.published import SuiteRequest
from slimrank.evaluate.sample import sample
from slimrank.evaluate.speed import measure_speed
from slimrank.evaluate.suite import Suite, compare, measure
from slimrank.evaluate.suite_means import mean_differences, suite_means
from slimrank.evaluate.tasks import Tasks
from slimrank.evaluate.windows import TextRequest, windows_of
from slimrank.models.load import load_model
from slimrank.models.placement import placed, resolve_device
from slimrank.models.structure import parameters_of
from slimrank.progress import Progress
from slimrank.text.reading import ReadPart
from slimrank.text.texts import window_length
from slimrank.text.tokens import bos_of
from slimrank.text.windows import tokens_digest

__all__ = ["benchmark", "evaluate", "windows_of"]

NO_BOS = (
    "windows begin without the BOS that the tokenizer puts before a text, as in papers; models that need it (Gemma) "
    "have a far higher perplexity so"
)


def evaluate(
    model: str | Path,
    texts: Sequence[str] | None = None,
    windows: int | None = None,
    seq_len: int | None = None,
    **options: Unpack[EvaluateOptions],
) -> dict[str, Any]:
    """Measure a saved model: all metrics on each text, tasks, speed, a sample and peak memory.

    Args:
        model: hub id, local folder, GGUF file, or "demo".
        texts: sources (see `text.sources`); None takes "demo", or no text if tasks are given.
        windows: first windows of each text; None takes all.
        seq_len: tokens per window; None takes 512 or the model's context.
        options: `device`: where to compute. `dtype`: dtype to load the model in. `progress`: told what happens.
            `tasks`: a `TaskRequest`. `against`: a model of the same tokens to compare with, usually the one that
            this one was made of. `suite`: a `SuiteRequest`, instead of texts and tasks; the record then has "suite",
            the means over its tasks. `chat`: read rows of chats as such, by the tokenizer's chat template.

    Returns:
        A record. "texts" holds the perplexity of each text, and "perplexity" that of the first; None without a text.
        "tasks" holds the result of each task, "task_settings" what was asked, "against" the comparison (see
        `evaluate.suite`); the last two are None where not wanted. "notes" name what was skipped or changed. Metrics
        from outside slimrank add their fields, see `evaluate.metric`.

    Raises:
        SlimrankError: an unreadable text, an unknown model or task, models of different tokens, one window to compare
            models on, windows without a text, non-finite logits.
        TypeError: an unknown option.
    """
    asked = Evaluation(**options)
    if asked.suite is None:
        request = replace(TextRequest.of(texts, windows, seq_len, asked.tasks), chat=asked.chat)
        return _evaluate(model, request, asked)
    if texts is not None or asked.tasks is not None or asked.chat or windows is not None or seq_len is not None:
        raise RecipeError(
            f"the suite '{asked.suite.name}' has texts and tasks of its own.", "--text, --tasks and --chat, or --suite"
        )
    with asked.suite.opened() as (request, tasks):
        record = _evaluate(model, request, replace(asked, tasks=tasks))
    record["task_settings"]["tasks_dir"] = str(asked.suite.data)  # not that of files which are gone
    return {**record, "suite": _summary(asked.suite, record)}


def _summary(request: SuiteRequest, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a suite says of a model as a whole."""
    averaged, against = request.suite.averaged, record["against"]
    return {
        "name": request.name,
        "title": request.suite.title,
        "data": str(request.data),
        "averaged": list(averaged),
        "means": suite_means(record["tasks"], averaged),
        "against": None if against is None else mean_differences(record["tasks"], against["tasks"], averaged),
    }


def _evaluate(model: str | Path, request: TextRequest, asked: Evaluation) -> dict[str, Any]:
    progress, windows = asked.progress or Progress(), request.windows
    if asked.against is not None:
        check_windows(windows)
    place = resolve_device(asked.device)
    loaded = _load(model, request, asked, progress)
    with placed([some for some in (loaded.model, loaded.dense) if some is not None], place, upcast=False):
        measured, compared = _measure(loaded, progress)
        speed = measure_speed(loaded.model)
        text = sample(loaded.model, loaded.tokenizer, loaded.prompt)
    first = next(iter(measured["texts"].values()), None)
    tasks = loaded.suite.tasks
    return {
        "model": str(model),
        "perplexity": None if first is None else first["perplexity"],
        **measured,
        "notes": loaded.notes,
        "task_settings": None if tasks is None else tasks.described(),
        "against": None if compared is None else {"model": str(asked.against), **compared},
        "speed": asdict(speed),
        "sample": text,
        "peak_memory": peak_memory(place),
        "parameters": parameters_of(loaded.model),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(place),
    }


@dataclass(frozen=True)
class _Loaded:
    """What is measured, and on what.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        dense: the model to compare with, if any.
        suite: the texts and tasks.
        prompt: the window that a sample goes on from.
        notes: what was skipped or changed.
    """

    model: Any
    tokenizer: Any
    dense: Any
    suite: Suite
    prompt: Tensor
    notes: list[str]


def _load(spec: str | Path, request: TextRequest, asked: Evaluation, progress: Progress) -> _Loaded:
    """Read the texts, then the tasks, then the models: what is missing is found before a model is loaded."""
    sources, notes = request.read(progress)
    tasks = None if asked.tasks is None else Tasks(asked.tasks, progress)
    read = load_model(spec, asked.dtype, progress)
    notes += read.notes
    taken = {name: _first_windows(name, sources[name].text(read.tokenizer), read, request, asked) for name in sources}
    dense = None
    if asked.against is not None:
        other = load_model(asked.against, asked.dtype, progress)
        notes += [f"{asked.against}: {note}" for note in other.notes]
        _check_same_tokens(asked.against, other, sources, taken, request.bos)
        dense = other.model
    bos = request.bos and bos_of(read.tokenizer) is not None
    if not request.bos and bos_of(read.tokenizer) is not None:
        notes.append(NO_BOS)
    suite = Suite(taken if request.names else {}, bos, tasks)
    return _Loaded(read.model, read.tokenizer, dense, suite, next(iter(taken.values()))[0], notes)


def _first_windows(name: str, text: str, read: Any, request: TextRequest, asked: Evaluation) -> Tensor:
    """Take the windows of one text; if no text is named, one for the sample and to compare tokenizers."""
    wanted = request.windows if request.names else 1
    length, least = window_length(read.model, request.seq_len), 1 if asked.against is None else MIN_ITEMS
    size: Any = {"windows": wanted, "seq_len": length, "least": least, "special": request.bos}
    return windows_of(name, text, read.model, read.tokenizer, **size)[: request.most.get(name)]


def _check_same_tokens(
    spec: str | Path, read: Any, sources: Mapping[str, ReadPart], taken: Mapping[str, Tensor], special: bool
) -> None:
    """Make sure that another model reads the texts as the same windows of tokens.

    Raises:
        ModelError: it does not.
    """
    for source, windows in taken.items():
        count, length = windows.shape
        window_length(read.model, length)
        size: Any = {"windows": count, "seq_len": length, "special": special}
        own = windows_of(source, sources[source].text(read.tokenizer), read.model, read.tokenizer, **size)
        if not torch.equal(own, windows):
            raise ModelError(
                f"'{spec}' reads '{source}' as other tokens than the model does.",
                "compare a model with the one that it was made of",
            )


def _measure(loaded: _Loaded, progress: Progress) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the record of the model, with digests of its windows, and that of the comparison, if any."""
    compared = None
    if loaded.dense is None:
        measured = measure(loaded.model, loaded.tokenizer, loaded.suite, progress)
    else:
        measured, differences = compare(loaded.model, loaded.dense, loaded.tokenizer, loaded.suite, progress)
        compared = {"parameters": parameters_of(loaded.dense), **differences}
    for source, windows in loaded.suite.texts.items():
        measured["texts"][source]["tokens_sha256"] = tokens_digest(windows)
    return measured, compared
