"""Load what a compression needs: texts, model, tokenizer. Whatever can fail does so here, before any long work."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from slimrank.checkpoint.companions import rehearse_saving
from slimrank.checkpoint.output_folder import OutputFolder
from slimrank.errors import RecipeError
from slimrank.models.blocks import BlockRunner
from slimrank.models.gradients import check_differentiable
from slimrank.models.kind import check_decoder
from slimrank.models.load import digest, load_model
from slimrank.models.page_out import page_out
from slimrank.models.provenance import origin_of
from slimrank.models.quantised import check_dense
from slimrank.pipeline.prepare import Choices, Prepared
from slimrank.pipeline.state import Inputs
from slimrank.processes import by_leader
from slimrank.progress import Progress
from slimrank.text.texts import Texts, WindowRequest, read_texts

_ONE_BY_ONE = "experts run one by one, each as linear layers; the original is measured in the same way"


@dataclass(frozen=True)
class _Loaded:
    model: Any
    tokenizer: Any
    file_bytes: int | None
    notes: list[str]


def load_inputs(
    choices: Choices,
    requests: Iterable[WindowRequest],
    model: Any,
    tokenizer: Any,
    progress: Progress,
    output: OutputFolder | None = None,
) -> Inputs:
    """Read the texts, load the model and resolve the recipe for it.

    Raises:
        SlimrankError: anything that prevents the compression, or writing to `output`.
    """
    raw = read_texts(choices.recipe, requests)
    loaded = _load(model, tokenizer, choices.recipe.dtype, progress)
    prepared = Prepared.of(choices, loaded.model)
    if output is not None:
        by_leader(lambda: rehearse_saving(loaded.model, loaded.tokenizer, output))
    fingerprint = digest(loaded.model)
    page_out(loaded.model)
    if choices.differentiates:
        check_differentiable(loaded.model)
    texts = raw.tokenised(prepared.recipe, loaded.model, loaded.tokenizer, progress)
    _check_blocks(prepared, texts)
    if texts.overlap:
        progress.note(texts.overlap)
    notes = [*loaded.notes, *([_ONE_BY_ONE] if prepared.unfused else []), *texts.notes]
    notes += [f"{t.path}: shared with {', '.join(t.ties)}; its own inputs count" for t in prepared.targets if t.ties]
    return Inputs(prepared, texts, loaded.tokenizer, fingerprint, origin_of(model), loaded.file_bytes, notes)


def _load(model: Any, tokenizer: Any, dtype: str, progress: Progress) -> _Loaded:
    """Load a model by name; check one that is loaded already."""
    if isinstance(model, (str, Path)):
        progress.note(f"loading {model}")
        loaded = load_model(model, dtype, progress)
        return _Loaded(loaded.model, loaded.tokenizer, loaded.file_bytes, list(loaded.notes))
    if dtype != "auto":
        raise RecipeError("a loaded model keeps its dtype.", "call model.to(dtype) first, or give its name or folder")
    check_dense(model)
    if isinstance(getattr(model, "config", None), PreTrainedConfig):
        check_decoder(type(model).__name__, model.config)
    return _Loaded(model, tokenizer, None, [])


def _check_blocks(prepared: Prepared, texts: Texts) -> None:
    """Check that each block computes the same alone as in the model.

    Raises:
        ModelError: they do not.
    """
    windows = texts.get("calibration")
    if windows is not None:
        apart = texts.get("search") is not None
        BlockRunner(prepared.model, prepared.device, prepared.upcast, False).check(windows, apart=apart)
