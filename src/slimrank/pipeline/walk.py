"""`compress`: all stages in order."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from slimrank.budget.rank_plan import RankPlan
from slimrank.checkpoint.output_folder import CARD, OutputFolder, need_space, write_manifest
from slimrank.checkpoint.save import mark_model, save_model, weight_bytes
from slimrank.errors import RecipeError
from slimrank.models.fused_layers import put_together
from slimrank.models.provenance import origin_of
from slimrank.models.storage import saved_bytes
from slimrank.models.structure import find_blocks
from slimrank.pipeline.allocating import allocate
from slimrank.pipeline.correcting import Correction
from slimrank.pipeline.cutting import Cut, Cutter
from slimrank.pipeline.decomposing import decompose, is_decomposed
from slimrank.pipeline.job import CompressionResult, Job
from slimrank.pipeline.kept import KeptStatistics
from slimrank.pipeline.refining import Refinement
from slimrank.progress import Progress
from slimrank.recipe import Recipe
from slimrank.report.card import model_card
from slimrank.report.record import Facts, build_record
from slimrank.report.write import write_reports
from slimrank.store import Run, Stage, remove_run, usable_folder, write_text


def compress(
    model: Any,
    tokenizer: Any = None,
    *,
    recipe: Recipe | None = None,
    out: str | Path | None = None,
    run_dir: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    keep_statistics: bool = False,
    **options: Any,
) -> CompressionResult:
    """Compress a model.

    Args:
        model: a hub id, local folder, GGUF file or "demo"; or a loaded model, which is changed in place.
        tokenizer: needed for a loaded model, unless neither calibration nor evaluation text is used.
        recipe: what to do; or give its fields as keyword options (`keep_ratio=0.8, samples=64`).
        out: folder to write model, plan and report to. Without it nothing is written.
        run_dir: where finished parts are kept, so that an interrupted run goes on and another budget needs no
            new calibration. By default `OUT.run`, removed at the end.
        overwrite: replace what slimrank wrote to `out` before.
        progress: told what happens.
        keep_statistics: keep in `run_dir` what was gathered of the calibration text, too (as much disk again, or
            several times that for methods that need the whole gram of the inputs), so that another method, or the same
            with other options, finds it there and need not read the text again. Nothing is gathered for spectra that
            are there already.
        options: fields of `Recipe`.

    Raises:
        SlimrankError: see `slimrank.errors`; everything that can be checked beforehand is.
    """
    resumable = out is not None or run_dir is not None
    if keep_statistics and run_dir is None:
        raise RecipeError("statistics are kept in a run directory, and none is named.", "run_dir='run'")
    output = OutputFolder(Path(out), overwrite) if out is not None else None
    job = Job(Recipe.merged(recipe, options), progress or Progress(), resumable, keep_statistics, output=output)
    if output is not None:
        output.rehearse()
    place = _place_of_run(output, run_dir)
    with _restored(model):
        return _compress(job, model, tokenizer, output, place)


def _kept(job: Job, run: Run) -> KeptStatistics | None:
    """Where statistics are kept, if they are."""
    return (
        KeptStatistics(run.stage(job.statistics_key()), len(find_blocks(job.model)[1]), job.solver)
        if job.keeps
        else None
    )


@contextmanager
def _restored(model: Any) -> Iterator[None]:
    """A loaded model that comes out uncut has its experts and layers in one piece again, to be saved as it was."""
    try:
        yield
    finally:
        if isinstance(model, nn.Module) and not hasattr(getattr(model, "config", None), "slimrank"):
            put_together(model)


def _compress(
    job: Job, model: Any, tokenizer: Any, output: OutputFolder | None, run_dir: Path | None
) -> CompressionResult:
    job.load(model, tokenizer)
    origin = origin_of(model)
    with _run_folder(output, run_dir) as folder, Run(folder, job.identity()) as run:
        stage = run.stage(job.spectra_key())
        job.announce(is_decomposed(job, stage))
        need_space(folder, job.stored_bytes())
        if output is not None:
            need_space(output.path, job.predicted_bytes() + (0 if run_dir else job.stored_bytes()))
        before = job.measure_original(run)
        decompose(job, stage, _kept(job, run))
        allocation = allocate(job, run, stage)
        correction = Correction(job, run.stage(job.correction_key())) if job.recipe.corrections else None
        if correction is not None:
            correction.remember()
        done = _cut(job, stage, run.stage(job.refinement_key()) if job.refiner else None)
        corrections = correction.walk() if correction is not None else []
        after = job.measure_result()
        facts = Facts(
            model={**origin, "class": type(job.model).__name__},
            recipe=job.recipe, targets=job.targets, plan=job.plan, errors=done.rows, spectra=done.spectra,
            notes=[*job.notes, *done.notes],
            before=before, after=after, seconds=job.seconds, identity=job.identity(), new_biases=done.new_biases,
            bytes_before=job.file_bytes or job.size.total, bytes_after=saved_bytes(job.model),
            dtype=str(job.dtype).removeprefix("torch."), device=str(job.device), method=job.method.described(),
            allocation=allocation, corrections=corrections, overlap=job.texts.overlap,
        )  # fmt: skip
        record = build_record(facts)
        if output is not None:
            _write(job, record, output)
    return CompressionResult(job.model, job.tokenizer, job.plan, record, output.path if output else None)


def find_plan(
    model: Any,
    tokenizer: Any = None,
    *,
    recipe: Recipe | None = None,
    run_dir: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> tuple[RankPlan, dict[str, Any]]:
    """The plan that `compress` would follow with the same arguments, without cutting anything.

    Decomposes and measures as far as the allocation needs it; with `run_dir` what is found is kept there, and
    `compress` does not compute it again.

    Returns:
        The plan, and what there is to tell of the allocation ("gap", "trade_off", "additivity", ...).

    Raises:
        SlimrankError: see `slimrank.errors`.
    """
    made = Recipe.merged(recipe, options).model_copy(update={"evaluation": None})
    job = Job(made, progress or Progress(), resumable=run_dir is not None, cuts=False)
    place = _place_of_run(None, run_dir)
    with _restored(model):
        job.load(model, tokenizer)
        with _run_folder(None, place) as folder, Run(folder, job.identity()) as run:
            stage = run.stage(job.spectra_key())
            job.announce(is_decomposed(job, stage))
            need_space(folder, job.stored_bytes())
            if job.allocates:
                decompose(job, stage)
            about = allocate(job, run, stage)
    return job.plan, about


def _cut(job: Job, stage: Stage, refinement: Stage | None) -> Cut:
    """Factors at the planned ranks in the place of the weights, refined where asked for."""
    cutter = Cutter(job, stage)
    try:
        if refinement is not None:
            Refinement(job, cutter, refinement).walk()
        else:
            cutter.walk()
    finally:  # a model that is half cut says so too: saved as a native one it would load with random weights
        mark_model(job.model)
    return cutter.done


def _write(job: Job, record: dict[str, Any], output: OutputFolder) -> None:
    """The model, what loads it, and what there is to read about it. A card that is not ours stays as it is."""
    with output.writing() as partial:
        with job.timed("write", 1):
            record["notes"] += save_model(job.model, job.tokenizer, partial, job.recipe.max_shard_size)
        record["size"]["bytes_after"] = weight_bytes(partial)
        job.plan.save(partial / "plan.json")
        if output.keeps_card:
            record["notes"].append(f"{CARD} in the output folder is not as slimrank wrote it, and stays")
        else:
            write_text(partial / CARD, model_card(record))
        write_manifest(partial, record["provenance"])
        write_reports(record, partial)


def _place_of_run(output: OutputFolder | None, run_dir: str | Path | None) -> Path | None:
    """The run directory that is named; None where nobody asked for one. Refuses what cannot be used."""
    if run_dir is not None:
        return usable_folder(run_dir, output.path if output else None)
    if output is not None:
        usable_folder(_own_run(output), output.path)
    return None


def _own_run(output: OutputFolder) -> Path:
    return output.path.with_name(output.path.name + ".run")


@contextmanager
def _run_folder(output: OutputFolder | None, run_dir: Path | None) -> Iterator[Path]:
    """The run directory; one that nobody asked for is removed when all is done, and kept when it is not."""
    if run_dir is not None:
        yield run_dir
    elif output is None:
        with tempfile.TemporaryDirectory(prefix="slimrank-") as temporary:
            yield Path(temporary)
    else:
        yield _own_run(output)
        remove_run(_own_run(output))
