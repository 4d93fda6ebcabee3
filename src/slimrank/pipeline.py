"""The walk of a model through all stages. The only place that joins them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimrank.allocate.plan import RankPlan
from slimrank.allocate.registry import ALLOCATORS
from slimrank.calibration.statistics import StatisticsCollector
from slimrank.decompose.registry import DECOMPOSERS, Decomposer
from slimrank.errors import RecipeError
from slimrank.estimate import measure_machine, stage_seconds
from slimrank.evaluate.memory import peak_memory
from slimrank.evaluate.quality import measure_quality
from slimrank.evaluate.speed import measure_speed
from slimrank.export.output import OutputFolder, need_space, write_manifest
from slimrank.export.save import check_loadable, mark_model, replace_linear, save_model, weight_bytes
from slimrank.inputs import Texts, prepare_texts, window_length
from slimrank.linalg.lowrank import Spectrum
from slimrank.models.blocks import Batch, BlockRunner
from slimrank.models.load import digest, load, stored_dtype
from slimrank.models.paging import page_out
from slimrank.models.placement import placed, resolve_device, solving_device
from slimrank.models.structure import find_blocks
from slimrank.models.targets import Target, TargetSet, find_targets, weight_of
from slimrank.planning import make_plan, workload
from slimrank.progress import Progress
from slimrank.recipe import Recipe
from slimrank.report.record import Facts, build_record
from slimrank.report.render import write_reports
from slimrank.run import Run, Stage, remove_run


@dataclass(frozen=True)
class CompressionResult:
    """What `compress` gives back.

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


def compress(
    model: Any,
    tokenizer: Any = None,
    *,
    recipe: Recipe | None = None,
    out: str | Path | None = None,
    run_dir: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
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
        options: fields of `Recipe`.

    Raises:
        SlimrankError: see `slimrank.errors`; everything that can be checked beforehand is.
    """
    resumable = out is not None or run_dir is not None
    job = _Job(Recipe.merged(recipe, options), progress or Progress(), resumable)
    output = OutputFolder(Path(out), overwrite) if out is not None else None
    job.load(model, tokenizer)
    with _run_folder(output.path if output else None, run_dir) as folder:
        run = Run(folder, job.identity())
        job.announce()
        need_space(folder, job.stored_bytes())
        if output is not None:
            need_space(output.path, job.predicted_bytes() + (0 if run_dir else job.stored_bytes()))
        before = job.measure_original(run)
        stage = run.stage(job.spectra_key())
        job.decompose(stage)
        errors, notes = job.cut(stage)
        after = job.measure_result()
        facts = Facts(
            recipe=job.recipe, targets=job.targets, plan=job.plan, errors=errors, notes=[*job.notes, *notes],
            before=before, after=after, seconds=job.seconds, identity=job.identity(),
            dtype=str(job.dtype).removeprefix("torch."), device=str(job.device),
        )  # fmt: skip
        record = build_record(facts)
        if output is not None:
            with output.writing() as partial:
                with job.timed("write", 1):
                    save_model(job.model, job.tokenizer, partial, job.recipe.max_shard_size)
                record["size"]["bytes_after"] = weight_bytes(partial)
                job.plan.save(partial / "plan.json")
                write_manifest(partial, record["provenance"])
                write_reports(record, partial)
    return CompressionResult(job.model, job.tokenizer, job.plan, record, output.path if output else None)


@contextmanager
def _run_folder(out: Path | None, run_dir: str | Path | None) -> Iterator[Path]:
    """The run directory; one that nobody asked for is removed when all is done, and kept when it is not."""
    if run_dir is not None:
        yield Path(run_dir)
    elif out is None:
        with tempfile.TemporaryDirectory(prefix="slimrank-") as temporary:
            yield Path(temporary)
    else:
        folder = out.with_name(out.name + ".run")
        yield folder
        remove_run(folder)


class _Job:
    """The state of one compression, and its stages in order."""

    def __init__(self, recipe: Recipe, progress: Progress, resumable: bool) -> None:
        self.recipe, self.progress, self.resumable = recipe, progress, resumable
        self.method: Decomposer = DECOMPOSERS.get(recipe.method)
        ALLOCATORS.get(recipe.allocation)
        self.device = resolve_device(recipe.device)
        self.solver = solving_device(self.device)
        self.upcast = self.device.type == "cpu"
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []

    # inputs -------------------------------------------------------------------------------------------------

    def load(self, model: Any, tokenizer: Any) -> None:
        """Load the model, find its targets, make the plan, read the texts: all that may fail, fails here."""
        recipe = self.recipe
        if isinstance(recipe.plan, str):
            RankPlan.load(recipe.plan)
        texts = prepare_texts(recipe, "gram" in self.method.needs)
        if isinstance(model, (str, Path)):
            self.progress.note(f"loading {model}")
            model, tokenizer = load(model, recipe.dtype, self.progress)
        elif recipe.dtype != "auto":
            raise RecipeError("a loaded model keeps its dtype.", "model.to(dtype) before, or give its name or folder")
        self.model, self.tokenizer = model, tokenizer
        find_blocks(model)
        self.recipe = recipe = recipe.model_copy(update={"seq_len": window_length(model, recipe.seq_len)})
        self.dtype = stored_dtype(model)
        self.targets: TargetSet = find_targets(model, recipe.targets, recipe.ignore)
        check_loadable(model)
        self.plan = make_plan(recipe, model, self.targets, self.dtype.itemsize)
        self.digest = digest(model)
        page_out(model)
        self.texts: Texts = texts.tokenised(recipe, model, tokenizer, self.progress)
        self.notes += self.texts.notes
        self.notes += [
            f"{t.path}: shared with {', '.join(t.ties)}; its own inputs count" for t in self.targets if t.ties
        ]

    def identity(self) -> dict[str, Any]:
        """What the run is about; a run directory made for anything else is refused."""
        return {
            "model": self.digest,
            "calibration": self.texts.calibration_digest,
            "targets": list(self.recipe.targets),
            "ignore": list(self.recipe.ignore),
        }

    def spectra_key(self) -> dict[str, Any]:
        """Everything that the spectra depend on."""
        return {
            **self.identity(),
            "method": self.method.id,
            "device": self.device.type,
            "batch": self.recipe.batch_size,
            "resident": self.recipe.resident,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    def predicted_bytes(self) -> int:
        """Bytes of the weights to be written."""
        coverage = self.targets.coverage
        return (coverage.total - coverage.targets + self.plan.parameters) * self.dtype.itemsize

    def stored_bytes(self) -> int:
        """About how much the run directory will hold: the bases of all targets, and the hidden states."""
        width = self.targets.targets[0].shape[1]
        bases = sum(min(t.shape) ** 2 for t in self.targets)
        return 4 * (bases + (self.texts.calibration_tokens * width if self.resumable else 0))

    def announce(self) -> None:
        """Tell the progress which stages are coming, and how long each may take."""
        work = workload(self.model, self.targets, self.texts.calibration_tokens, self.texts.evaluation_tokens)
        self.progress.plan(stage_seconds(work, measure_machine(self.device)))

    # stages -------------------------------------------------------------------------------------------------

    @contextmanager
    def timed(self, name: str, steps: int) -> Iterator[None]:
        """A stage of so many steps; its seconds go into the report."""
        self.progress.stage(name, steps)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def measure_original(self, run: Run) -> dict[str, Any]:
        """Perplexity, speed and a sample of the model as it is; taken from the run where it is known already."""
        key = {**self.identity(), "original": self.texts.evaluation_digest, "dtype": str(self.dtype)}
        stage = run.stage({**key, "device": str(self.device)})
        with self.timed("measure the original", self.texts.evaluation_windows):
            known = stage.load("original")[1] if stage.has("original") else {}
            before = self._measure(known)
        stage.save("original", {}, before)
        return before

    def measure_result(self) -> dict[str, Any]:
        """The same for the compressed model."""
        with self.timed("measure the result", self.texts.evaluation_windows):
            return self._measure({})

    def _measure(self, known: dict[str, Any]) -> dict[str, Any]:
        """Everything that is not known already; speed is never taken from an earlier session."""
        if self.texts.evaluation is None:
            return {}
        with placed([self.model], self.device, upcast=False):
            speed = asdict(measure_speed(self.model))
            fresh = known or measure_quality(
                self.model, self.tokenizer, self.texts.evaluation, self.texts.bos, self.progress
            )
        return {**fresh, "speed": speed, "peak_memory": peak_memory()}

    def decompose(self, stage: Stage) -> None:
        """Spectra of all targets into the store, block after block; finished blocks are not done again."""
        runner = BlockRunner(self.model, self.device, self.upcast, self.recipe.resident)
        with self.timed("calibrate and decompose", len(runner)), runner.session():
            first = _finished(stage, len(runner))
            if first:
                self.progress.note(f"resuming at block {first} of {len(runner)}")
                self.progress.step(first)
            if first < len(runner):
                self._start(runner, stage, first)
            for index in range(first, len(runner)):
                self._decompose_block(runner, stage, index)
                page_out(runner.blocks[index])
                self.progress.step()

    def _start(self, runner: BlockRunner, stage: Stage, first: int) -> None:
        runner.embed(_batches(self.texts.calibration, self.recipe.batch_size))
        page_out(self.model)
        if first and runner.batches:
            stored, _ = stage.load("hidden", str(self.device) if self.recipe.resident else "cpu")
            runner.hidden = [stored[str(b)] for b in range(len(runner.batches))]

    def _decompose_block(self, runner: BlockRunner, stage: Stage, index: int) -> None:
        targets = self.targets.in_block(index)
        layers = {t.path: self.model.get_submodule(t.path) for t in targets}
        with runner.placed_block(index):
            collector = StatisticsCollector(layers, self.solver)
            with collector if runner.batches else nullcontext():
                runner.step(index, lambda batch: collector.begin(batch.attention_mask))
            grams = _Grams(collector) if runner.batches else None
            tensors: dict[str, Tensor] = {}
            about: dict[str, Any] = {}
            for path, layer in layers.items():
                spectrum = self._solve(path, weight_of(layer).to(self.solver), grams)
                tensors[f"{path}.values"] = spectrum.values.cpu()
                tensors[f"{path}.basis"] = spectrum.basis.to("cpu", torch.float32)
                group = collector.leaders.get(path, path)
                about[path] = {"side": spectrum.side, "notes": spectrum.notes, "group": group}
        stage.save(f"block-{index:04d}", tensors, about)
        if self.resumable:
            stage.save("hidden", {str(b): h for b, h in enumerate(runner.hidden)}, {"next": index + 1})

    def _solve(self, path: str, weight: Tensor, grams: _Grams | None) -> Spectrum:
        if grams is None:
            return self.method.solve(weight, None)
        gram = grams.of(path)
        if gram is not None:
            return self.method.solve(weight, gram)
        plain = DECOMPOSERS.get("svd").solve(weight, None)
        return replace(plain, notes=(*plain.notes, "no calibration token reached this layer: plain SVD instead"))

    def cut(self, stage: Stage) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Factors at the planned ranks in the place of the weights; per target its error and group, and notes."""
        results: dict[str, dict[str, Any]] = {}
        notes: list[str] = []
        blocks = sorted({t.block for t in self.targets})
        try:
            with self.timed("cut factors", len(blocks)):
                for index in blocks:
                    tensors, about = stage.load(f"block-{index:04d}", str(self.solver))
                    for target in self.targets.in_block(index):
                        spectrum = _stored_spectrum(target.path, tensors, about)
                        error = self._cut_target(target, spectrum)
                        results[target.path] = {"relative_error": error, "group": about[target.path]["group"]}
                        notes += [f"{target.path}: {note}" for note in spectrum.notes]
                    self.progress.step()
        finally:  # a model that is half cut says so too: saved as a native one it would load with random weights
            mark_model(self.model)
        return results, notes

    def _cut_target(self, target: Target, spectrum: Spectrum) -> float:
        """Replace one weight by its factors; gives back the relative error (0 for one that stays dense)."""
        rank = self.plan.targets[target.path].rank
        if rank == "dense":
            return 0.0
        layer = self.model.get_submodule(target.path)
        factors = spectrum.factors(weight_of(layer).to(self.solver), rank)
        page_out(layer)
        replace_linear(self.model, (target.path, *target.ties), *factors)
        return spectrum.relative_error(rank)


class _Grams:
    """The Gram of each group, mirrored once."""

    def __init__(self, collector: StatisticsCollector) -> None:
        self.collector = collector
        self._known: dict[str, Tensor] = {}

    def of(self, path: str) -> Tensor | None:
        """The Gram of what a layer reads; None when no token reached it."""
        leader = self.collector.leaders.get(path)
        if leader is None:
            return None
        if leader not in self._known:
            self._known[leader] = self.collector.of(path).gram
        return self._known[leader]


def _finished(stage: Stage, blocks: int) -> int:
    """Blocks whose spectra are stored, and whose outputs are stored as the next block's inputs."""
    done = int(stage.load("hidden")[1]["next"]) if stage.has("hidden") else 0
    return done if all(stage.has(f"block-{i:04d}") for i in range(done)) and done <= blocks else 0


def _batches(windows: Tensor | None, size: int) -> Sequence[Batch]:
    return [] if windows is None else [Batch(ids) for ids in windows.split(size)]


def _stored_spectrum(path: str, tensors: dict[str, Tensor], about: dict[str, Any]) -> Spectrum:
    return Spectrum(
        tensors[f"{path}.values"], tensors[f"{path}.basis"], about[path]["side"], tuple(about[path]["notes"])
    )
