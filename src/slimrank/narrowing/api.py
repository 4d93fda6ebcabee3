"""`narrow`: make MLPs narrow, write the result as a model of the same class, and measure what was written."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimrank.checkpoint.companions import rehearse_saving
from slimrank.checkpoint.output_folder import OutputFolder, need_space, write_manifest
from slimrank.checkpoint.save import check_loadable, save_model
from slimrank.errors import ModelError
from slimrank.evaluate.paired import MIN_ITEMS
from slimrank.evaluate.suite import Suite, compare
from slimrank.evaluate.windows import windows_of
from slimrank.layers.experts import fuse, unfuse
from slimrank.models.blocks import BlockRunner
from slimrank.models.load import Loaded, digest, load_model
from slimrank.models.mlps import find_mlps
from slimrank.models.placement import placed, resolve_device, solving_device
from slimrank.models.provenance import origin_of
from slimrank.models.recording import Batch
from slimrank.models.storage import saved_bytes
from slimrank.models.targets import TargetSet, check_uncompressed, find_targets
from slimrank.narrowing.blocks import NarrowedMlp, Narrower, NarrowOptions
from slimrank.narrowing.record import NarrowRecord, Size, write_record
from slimrank.narrowing.request import Narrowing
from slimrank.narrowing.widths import Widths, fitting_widths, set_fields, width_fields
from slimrank.pipeline.stages.dual_stream import DualStream
from slimrank.progress import Progress
from slimrank.recipe import Recipe
from slimrank.report.build import environment
from slimrank.text.sources import read_source
from slimrank.text.texts import WindowRequest, read_texts, window_length
from slimrank.text.tokens import bos_of


@dataclass(frozen=True)
class NarrowResult:
    """What `narrow` returns.

    Attributes:
        model: the narrow model, read from the folder that was written.
        tokenizer: its tokenizer.
        record: what was done.
        out: the folder.
    """

    model: Any
    tokenizer: Any
    record: NarrowRecord
    out: Path


@dataclass(frozen=True)
class _Job:
    """What was loaded and decided before the work.

    Attributes:
        asked: the request.
        loaded: the original; it becomes the narrow model.
        targets: all linear layers in its blocks.
        widths: the new ones.
        windows: to calibrate on.
        suite: what both models are measured on.
        notes: anything unusual so far.
    """

    asked: Narrowing
    loaded: Loaded
    targets: TargetSet
    widths: Widths
    windows: Tensor
    suite: Suite
    notes: list[str]


def narrow(
    model: str | Path, *, out: str | Path, overwrite: bool = False, progress: Progress | None = None, **options: Any
) -> NarrowResult:
    """Give the MLPs of a model fewer hidden units, one width for all blocks, and write it as a model of its own class.

    In every block, hidden units are chosen by the covariance of all units, and the layer that reads them is the
    least-squares fit to the original's outputs: MoDeGPT's reduction of MLPs (arXiv 2408.09632), fitted block by block
    on the inputs in the narrow model. The result needs no slimrank.

    Args:
        model: a hub id, local folder, GGUF file or "demo".
        out: folder to write to.
        overwrite: replace what slimrank wrote to `out` before.
        progress: told what happens.
        options: fields of `Narrowing`; `keep_ratio` is needed.

    Raises:
        RecipeError: unknown options, or values out of range.
        BudgetError: the narrowest MLPs are above the budget.
        ModelError: a model that cannot be loaded, is compressed already, has no MLPs that were found, or whose
            configuration does not state their width.
        DataError: too little text.
        OutputError: the output folder is in use, or cannot be written.
    """
    asked, progress = Narrowing.make(options), progress or Progress()
    device, output = resolve_device(asked.device), OutputFolder(Path(out), overwrite)
    output.rehearse()
    job = _prepared(asked, model, output, progress)
    before = _size(job.loaded.model, job.widths.linears)
    need_space(output.path, before.bytes)
    start = time.perf_counter()
    mlps = _narrowed(job, device, progress)
    seconds = time.perf_counter() - start
    native = job.loaded.model
    with output.writing() as partial:
        job.notes.extend(save_model(native, job.loaded.tokenizer, partial, asked.max_shard_size))
        written = load_model(partial, "auto")
        _check_written(native, written.model)
        record = NarrowRecord(
            origin_of(model), type(native).__name__, asked,
            {f.name: (f.value, job.widths.values[f.name]) for f in job.widths.fields}, mlps, before,
            _size(written.model, job.widths.left), _measured(job, model, written.model, device, progress), seconds,
            job.notes, environment(),
        )  # fmt: skip
        write_record(record, partial, not output.keeps_card)
        write_manifest(partial, {**environment(), "narrow": asked.model_dump(mode="json")})
    return NarrowResult(written.model, job.loaded.tokenizer, record, output.path)


def _prepared(asked: Narrowing, name: str | Path, output: OutputFolder, progress: Progress) -> _Job:
    """Load the model and the texts, and find the widths; whatever can be refused is refused here."""
    recipe = _recipe(asked)
    raw = read_texts(recipe, [WindowRequest("calibration", asked.samples)])
    texts = {source: read_source(source, "evaluation") for source in asked.evaluation}
    loaded = load_model(name, asked.dtype, progress)
    model, tokenizer = loaded.model, loaded.tokenizer
    check_uncompressed(model)
    check_loadable(model)
    unfuse(model)
    targets = find_targets(model)
    fields = width_fields(model, find_mlps(model))
    widths = fitting_widths(model, fields, targets.coverage.targets, asked.keep_ratio, asked.multiple)
    rehearse_saving(model, tokenizer, output)
    seq_len = window_length(model, asked.seq_len)
    drawn = raw.tokenised(recipe.model_copy(update={"seq_len": seq_len}), model, tokenizer, progress)
    size: Any = {"windows": asked.windows, "seq_len": seq_len, "least": MIN_ITEMS}
    found = {source: windows_of(source, text, model, tokenizer, **size) for source, text in texts.items()}
    notes = [*loaded.notes, *drawn.notes]
    return _Job(
        asked, loaded, targets, widths, drawn["calibration"], Suite(found, bos_of(tokenizer) is not None), notes
    )


def _recipe(asked: Narrowing) -> Recipe:
    """Return the request as far as text is concerned."""
    return Recipe.make({
        "method": "svd_llm", "calibration": asked.calibration, "samples": asked.samples, "seed": asked.seed,
        "device": asked.device, "evaluation": None,
    })  # fmt: skip


def _narrowed(job: _Job, device: torch.device, progress: Progress) -> Sequence[NarrowedMlp]:
    """Narrow the model in place, and its configuration."""
    model, asked, widths = job.loaded.model, job.asked, job.widths
    mlps: Sequence[NarrowedMlp] = []
    if widths.left < widths.linears:
        options = NarrowOptions(asked.select, asked.refit, asked.anchor, asked.ridge)
        runner = BlockRunner(model, device, device.type == "cpu", False)
        batches = [Batch(ids) for ids in job.windows.split(_recipe(asked).batch_size)]
        streams = DualStream(runner, batches, solving_device(device), options.following())
        mlps = Narrower(streams, job.widths, _by_block(job.targets), options).run(progress)
    fuse(model)
    set_fields(model.config, widths.values)
    return mlps


def _by_block(targets: TargetSet) -> Mapping[int, list[str]]:
    found: dict[int, list[str]] = {}
    for target in targets:
        found.setdefault(target.block, []).append(target.path)
    return found


def _size(model: Any, linears: int) -> Size:
    return Size(linears, model.num_parameters(), saved_bytes(model))


def _check_written(model: Any, written: Any) -> None:
    """Make sure that the folder holds the narrow model.

    Raises:
        ModelError: loading it gives another model.
    """
    if digest(model) != digest(written):
        raise ModelError(
            f"{type(model).__name__} cannot be made narrow: transformers loads other weights than were written.",
            "slimrank compress works on any linear layer",
        )


def _measured(job: _Job, original: str | Path, narrowed: Any, device: torch.device, progress: Progress) -> Any:
    """Measure the model that was written beside the original."""
    if not job.suite.texts:
        return {}
    dense = load_model(original, job.asked.dtype).model
    with placed([narrowed, dense], device, upcast=device.type == "cpu"):
        return compare(narrowed, dense, job.loaded.tokenizer, job.suite, progress)[1]["texts"]
