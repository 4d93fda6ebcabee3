"""`compress`: prepare a recipe, then run its stages in order. `find_plan` stops when the ranks are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from slimrank.budget.rank_plan import RankPlan
from slimrank.checkpoint.output_folder import OutputFolder, need_space
from slimrank.errors import RecipeError
from slimrank.models.fused_layers import join_layers
from slimrank.models.machine import measure_machine
from slimrank.pipeline.forecast import Cost, Shape, timetable
from slimrank.pipeline.inputs import load_inputs
from slimrank.pipeline.prepare import Choices, Prepared
from slimrank.pipeline.record import record_of
from slimrank.pipeline.run_folder import opened_run, place_of_run, run_folder
from slimrank.pipeline.sharing import shares_text
from slimrank.pipeline.stage import Stage
from slimrank.pipeline.stages.save import Save
from slimrank.pipeline.state import Inputs, State
from slimrank.processes import by_leader, processes, together
from slimrank.progress import Progress
from slimrank.recipe import Recipe


@dataclass(frozen=True)
class CompressionResult:
    """What `compress` returns.

    Attributes:
        model: the compressed model (the very object that was passed in, if it was one).
        tokenizer: its tokenizer.
        plan: the rank of every target.
        report: the content of report.json.
        out: the folder that was written, if any.
    """

    model: Any
    tokenizer: Any
    plan: RankPlan
    report: dict[str, Any]
    out: Path | None


@dataclass(frozen=True)
class Storage:
    """Options of `compress` about the disk, besides `out`; see there."""

    run_dir: str | Path | None = None
    overwrite: bool = False
    keep_statistics: bool = False

    @classmethod
    def taken_from(cls, options: dict[str, Any]) -> Storage:
        """Take these options out of others."""
        return cls(**{field.name: options.pop(field.name) for field in fields(cls) if field.name in options})


def compress(
    model: Any,
    tokenizer: Any = None,
    *,
    recipe: Recipe | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> CompressionResult:
    """Compress a model.

    Args:
        model: a hub id, local folder, GGUF file or "demo"; or a loaded model, which is changed in place.
        tokenizer: needed for a loaded model, unless neither calibration nor evaluation text is used.
        recipe: what to do; or give its fields as keyword options (`keep_ratio=0.8, samples=64`).
        out: folder to write model, plan and report to. Without it nothing is written.
        progress: told what happens.
        options: fields of `Recipe`, and these three. `run_dir`: where finished parts are stored, so that an
            interrupted run resumes and another budget needs no new calibration. By default `OUT.run`, removed at the
            end. `overwrite`: replace what slimrank wrote to `out` before. `keep_statistics`: store in `run_dir` the
            statistics of the calibration text, too (as much disk again, or several times that for methods that need
            the whole gram of the inputs). Another method, or the same with other options, then need not read the text
            again. Nothing is gathered for spectra that are there already.

    Raises:
        SlimrankError: see `slimrank.errors`; everything that can be checked beforehand is.
    """
    storage = Storage.taken_from(options)
    choices, progress = Choices.of(Recipe.merged(recipe, options)), progress or Progress()
    if storage.keep_statistics and storage.run_dir is None:
        raise RecipeError("statistics are stored in a run directory, and none is named.", "run_dir='run'")
    output = OutputFolder(Path(out), storage.overwrite) if out is not None else None
    place = place_of_run(output, storage.run_dir)
    stages = [*choices.stages, *([] if output is None else [Save(output)])]
    with together(), _restored(model):
        if output is not None:
            by_leader(output.rehearse)
        inputs = load_inputs(choices, choices.requests, model, tokenizer, progress, output)
        with _opened(inputs, stages, progress, _Disk(output, place, storage.keep_statistics)) as state:
            for stage in stages:
                _run(stage, state)
            record = record_of(state)
    return CompressionResult(state.model, inputs.tokenizer, state.plan, record, output.path if output else None)


def find_plan(
    model: Any,
    tokenizer: Any = None,
    *,
    recipe: Recipe | None = None,
    run_dir: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> tuple[RankPlan, dict[str, Any]]:
    """Return the plan that `compress` would follow with the same arguments, without factorizing anything.

    It decomposes and measures as far as the allocation needs it. With `run_dir` what it finds is stored there, and
    `compress` does not compute it again.

    Returns:
        The plan, and facts about the allocation ("gap", "trade_off", "additivity", ...).

    Raises:
        SlimrankError: see `slimrank.errors`.
    """
    choices = Choices.of(Recipe.merged(recipe, options).model_copy(update={"evaluation": None}))
    place, progress = place_of_run(None, run_dir), progress or Progress()
    wanted = ("calibrate", "rounding", "allocate") if choices.computes_ranks else ("allocate",)
    stages = [stage for stage in choices.stages if stage.id in wanted]
    requests = [request for request in choices.requests if not request.spread]  # those are for factors
    with together(), _restored(model):
        inputs = load_inputs(choices, requests, model, tokenizer, progress)
        with _opened(inputs, stages, progress, _Disk(None, place, False)) as state:
            for stage in stages:
                _run(stage, state)
    return state.plan, state.results.allocation


@dataclass(frozen=True)
class _Disk:
    """Where a run stores what: the output, the run directory that is named, and whether statistics go there."""

    output: OutputFolder | None
    run_dir: Path | None
    keeps_statistics: bool

    @property
    def resumable(self) -> bool:
        return self.output is not None or self.run_dir is not None


@contextmanager
def _opened(inputs: Inputs, stages: Sequence[Stage], progress: Progress, disk: _Disk) -> Iterator[State]:
    """Open the run directory, announce the stages and check that there is room for what they store."""
    prepared = inputs.prepared
    with run_folder(disk.output, disk.run_dir) as folder, opened_run(folder, inputs.identity()) as run:
        state = State(
            inputs, run, stages, progress, disk.resumable, disk.keeps_statistics, prepared.plan, notes=[*inputs.notes]
        )
        shape = Shape.of(
            prepared, inputs.texts.tokens(), resumable=disk.resumable, keeps_statistics=disk.keeps_statistics
        )
        costs = timetable(stages, prepared, shape)
        _announce(state, costs)
        state.notes += _about_processes(prepared)
        stored = sum(cost.stored for cost in costs.values())
        need_space(folder, stored)
        if disk.output is not None:
            written = prepared.size.compressed(prepared.recipe, prepared.plan, prepared.targets)
            need_space(disk.output.path, written + (0 if disk.run_dir else stored))
        yield state


def _about_processes(prepared: Prepared) -> list[str]:
    """Return notes on how several processes share the work; nothing for a single one."""
    team, gathering = processes(), prepared.choices.method.gathering
    if team.count == 1:
        return []
    notes = [f"{team.count} processes shared the work"]
    if gathering.calibrates and not shares_text(gathering):
        reason = "its statistics cannot be summed"
        notes.append(f"{prepared.recipe.method}: each process read all calibration text, because {reason}")
    return notes


def _run(stage: Stage, state: State) -> None:
    """Run a stage; before the first that factorizes, let all stages look at the original model."""
    if stage is next((some for some in state.stages if some.factorizes), None):
        for other in state.stages:
            other.before_factorizing(state)
    section = stage.run(state)
    if section is not None:
        state.results.sections.append(section)


def _announce(state: State, costs: Mapping[str, Cost]) -> None:
    """Tell the progress which stages are coming, and how long each may take."""
    machine = measure_machine(state.prepared.device, state.prepared.bfloat16)
    seconds = {title: cost.seconds(machine) for title, cost in costs.items()}
    for stage in state.stages:
        if stage.is_done(state):
            seconds[stage.title] = 0.0
    state.progress.plan(seconds)


@contextmanager
def _restored(model: Any) -> Iterator[None]:
    """Put the fused layers of a loaded model together again if it comes out uncompressed, to be saved as it was."""
    try:
        yield
    finally:
        if isinstance(model, nn.Module) and not hasattr(getattr(model, "config", None), "slimrank"):
            join_layers(model)
