"""What a compression knows: its inputs, its plan, and the measurements before and after."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from slimrank._version import __version__
from slimrank.budget.problem import Allocation, Problem
from slimrank.budget.rank_plan import RankPlan
from slimrank.checkpoint.companions import rehearse_saving
from slimrank.checkpoint.output_folder import OutputFolder
from slimrank.checkpoint.save import check_loadable
from slimrank.errors import RecipeError
from slimrank.evaluate.memory import peak_memory
from slimrank.evaluate.quality import measure_quality
from slimrank.layers.forms import layer_form
from slimrank.methods.allocator import ALLOCATORS
from slimrank.methods.decomposer import DECOMPOSERS, Configured
from slimrank.models.blocks import Batch, BlockRunner
from slimrank.models.fused_layers import take_apart
from slimrank.models.gradients import check_differentiable
from slimrank.models.kind import check_decoder
from slimrank.models.load import digest, load_model
from slimrank.models.page_out import page_out
from slimrank.models.placement import placed, resolve_device, solving_device
from slimrank.models.quantised import check_dense
from slimrank.models.storage import stored_dtype
from slimrank.models.targets import TargetSet, find_targets
from slimrank.pipeline.forecast import Workload, measure_machine, run_bytes, stage_seconds
from slimrank.pipeline.model_bytes import ModelBytes
from slimrank.pipeline.planning import (
    Unit,
    at_first,
    check_corrections,
    configured_refiner,
    following_plan,
    given_plan,
    make_problem,
    plan_of,
    reads_text,
    units_of,
    workload,
)
from slimrank.progress import Progress
from slimrank.recipe import Recipe
from slimrank.store import Run
from slimrank.text.texts import Texts, prepare_texts, window_length

BEFORE_CUTTING = ("calibrate and decompose", "allocate")


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


class Job:
    """The state of one compression.

    Args:
        recipe: what to do.
        progress: told what happens.
        resumable: whether finished parts are stored.
        keeps: whether statistics are, too.
        cuts: whether the model will be; if not, the work ends with the plan.
        output: where it will be written, if anywhere.
    """

    def __init__(
        self,
        recipe: Recipe,
        progress: Progress,
        resumable: bool,
        keeps: bool = False,
        cuts: bool = True,
        output: OutputFolder | None = None,
    ) -> None:
        self.recipe, self.progress, self.resumable, self.keeps, self.cuts = recipe, progress, resumable, keeps, cuts
        self.output = output
        self.method: Configured = DECOMPOSERS.get(recipe.method).configured(recipe.method_options)
        self.refiner = configured_refiner(recipe, self.method)
        check_corrections(recipe, self.method)
        self.allocator = ALLOCATORS.get(recipe.allocation).configured(recipe.allocation_options)
        self.device = resolve_device(recipe.device)
        self.solver = solving_device(self.device)
        self.upcast = self.device.type == "cpu"
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self.file_bytes: int | None = None  # of weights that were widened when they were loaded

    # inputs -------------------------------------------------------------------------------------------------

    def load(self, model: Any, tokenizer: Any) -> None:
        """Load the model, find its targets, make the plan, read the texts: all that may fail, fails here."""
        recipe = following_plan(self.recipe)
        holds_out = self.refiner is not None and self.refiner.following.held_out > 0
        searches = (recipe.plan is None and self.allocator.measures) or holds_out or recipe.corrections > 0
        factor = self.refiner.following.samples_factor if self.refiner and self.cuts else 1
        texts = prepare_texts(recipe, self.calibrates, searches, factor * recipe.samples if factor > 1 else None)
        if isinstance(model, (str, Path)):
            self.progress.note(f"loading {model}")
            loaded = load_model(model, recipe.dtype, self.progress)
            model, tokenizer, self.file_bytes = loaded.model, loaded.tokenizer, loaded.file_bytes
            self.notes += loaded.notes
        elif recipe.dtype != "auto":
            raise RecipeError("a loaded model keeps its dtype.", "model.to(dtype) before, or give its name or folder")
        else:
            check_dense(model)
            if isinstance(getattr(model, "config", None), PreTrainedConfig):
                check_decoder(type(model).__name__, model.config)
        self.model, self.tokenizer = model, tokenizer
        if take_apart(model, recipe.split):
            self.notes.append(
                "experts are computed one by one, each as linear layers, also while the original is measured"
            )
        self.recipe = recipe = recipe.model_copy(update={"seq_len": window_length(model, recipe.seq_len)})
        self.dtype = stored_dtype(model)
        descends = recipe.plan is None and "gradient" in self.allocator.needs
        differentiates = self.method.gathering.backward or recipe.corrections > 0 or descends
        self.upcast = self.upcast or (differentiates and self.dtype == torch.float16)
        self.targets: TargetSet = find_targets(model, recipe.targets, recipe.ignore, layer_form(recipe.factor_form))
        check_loadable(model)
        self.size = ModelBytes.of(model, self.targets)
        if self.output is not None:
            rehearse_saving(model, tokenizer, self.output)
        self.units: list[Unit] = units_of(self.method, self.targets, recipe.stored_as)
        self._plan()
        self.digest = digest(model)
        page_out(model)
        if differentiates:
            check_differentiable(model)
        self.texts: Texts = texts.tokenised(recipe, model, tokenizer, self.progress)
        if self.texts.calibration is not None:
            self.runner(resident=False).check(self.texts.calibration, apart=searches)
        if self.texts.overlap:
            self.progress.note(self.texts.overlap)
        self.notes += [*self.texts.notes, *self._fewer_held_out()]
        self.notes += [
            f"{t.path}: shared with {', '.join(t.ties)}; its own inputs count" for t in self.targets if t.ties
        ]

    def _fewer_held_out(self) -> list[str]:
        """A note, where refined blocks are judged on fewer windows than were asked for."""
        wanted = self.refiner.following.held_out if self.refiner is not None and self.cuts else 0
        there = self.recipe.search_samples
        if wanted <= there:
            return []
        return [f"refined blocks are judged on {there} windows, all that search_samples allows, not {wanted}"]

    def _plan(self) -> None:
        """The plan that is given, or what there is to allocate and a plan to go on with until it is."""
        plan = given_plan(self.recipe, self.targets, self.units)
        self.problem: Problem | None = None
        if plan is None:
            self.problem = make_problem(self.recipe, self.model, self.targets, self.units, self.size)
            plan = self.plan_of(at_first(self.problem, self.allocator))
        self.plan = plan
        self._ranks_at_first = plan.factored()

    def plan_of(self, allocation: Allocation) -> RankPlan:
        """An allocation as a plan of all targets."""
        assert self.problem is not None
        return plan_of(allocation, self.recipe, self.problem, self.targets, self.units)

    @property
    def allocates(self) -> bool:
        """Whether ranks are found from spectra or measurements, after decomposing."""
        return self.problem is not None and bool(self.allocator.needs)

    @property
    def calibrates(self) -> bool:
        """Whether calibration text is needed."""
        return reads_text(self.recipe, self.method)

    def identity(self) -> dict[str, Any]:
        """What the run is about; a run directory made for anything else is refused."""
        return {
            "model": self.digest,
            "calibration": self.texts.calibration_digest,
            "targets": list(self.recipe.targets),
            "ignore": list(self.recipe.ignore),
            "split": dict(self.recipe.split),
        }

    def statistics_key(self) -> dict[str, Any]:
        """Everything that statistics depend on, but for how they are gathered."""
        return {
            **self.identity(),
            "count": len(self.targets),  # there are more of them where pivot layers may be small
            "device": self.device.type,
            "batch": self.recipe.batch_size,
            "resident": self.recipe.resident,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "slimrank": __version__,
        }

    def spectra_key(self) -> dict[str, Any]:
        """Everything that the spectra depend on."""
        at_ranks = self.method.gathering.needs & {"rank", "projectors"}
        ranks = self._ranks_at_first if at_ranks else None
        return {**self.statistics_key(), "method": self.method.described(), "ranks": ranks}

    def allocation_key(self) -> dict[str, Any]:
        """Everything that measurements of the model's targets depend on."""
        return {**self.spectra_key(), "search": self.texts.search_digest, "dtype": str(self.dtype)}

    def refinement_key(self) -> dict[str, Any]:
        """Everything that refined factors depend on."""
        key = {**self.spectra_key(), "plan": self.plan.factored(), "stored_as": self.plan.stored_as}
        key["refine"] = self.refiner.described() if self.refiner is not None else None
        drawn = {"search": self.texts.search_digest, "refinement": self.texts.refinement_digest}
        return {**key, "dtype": str(self.dtype), **drawn}

    def correction_key(self) -> dict[str, Any]:
        """Everything that corrected factors depend on."""
        drawn = self.texts.correction_digest, self.recipe.correction_windows
        return {**self.refinement_key(), "corrections": drawn}

    def predicted_bytes(self) -> int:
        """Bytes of the weights to be written."""
        return self.size.compressed(self.recipe, self.plan, self.targets)

    def stored_bytes(self) -> int:
        """About how much the run directory will hold."""
        return run_bytes(self._work(), self.plan.stored_parameters, self.resumable, self.keeps)

    def announce(self, decomposed: bool) -> None:
        """Tell the progress which stages are coming, and how long each may take.

        Args:
            decomposed: whether spectra are there, from another budget or an interrupted run.
        """
        seconds = stage_seconds(self._work(), measure_machine(self.device))
        seconds |= {"calibrate and decompose": 0.0} if decomposed else {}
        self.progress.plan({name: s for name, s in seconds.items() if self.cuts or name in BEFORE_CUTTING})

    def _work(self) -> Workload:
        tokens = self.texts.calibration_tokens, self.texts.refinement_tokens, self.texts.evaluation_tokens
        return workload(self.recipe, self.model, self.targets, self.method, *tokens, self.recipe.seq_len or 0)

    def batches(self) -> Sequence[Batch]:
        """The calibration windows in batches; none for a method that needs no text."""
        return self._in_batches(self.texts.calibration)

    def refining_batches(self) -> Sequence[Batch]:
        """The windows that factors are refined on, in batches."""
        own = self.texts.refinement
        return self._in_batches(self.texts.calibration if own is None else own)

    def _in_batches(self, windows: Tensor | None) -> Sequence[Batch]:
        return [] if windows is None else [Batch(ids) for ids in windows.split(self.recipe.batch_size)]

    def runner(self, resident: bool) -> BlockRunner:
        """The model's blocks, as this job computes them."""
        return BlockRunner(self.model, self.device, self.upcast, resident)

    # measurements -------------------------------------------------------------------------------------------

    @contextmanager
    def timed(self, name: str, steps: int) -> Iterator[None]:
        """A stage of so many steps; its seconds go into the report."""
        self.progress.stage(name, steps)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def measure_original(self, run: Run) -> dict[str, Any]:
        """Perplexity and a sample of the model as it is; taken from the run where it is known already."""
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
        """Measure what is not known already.

        Speeds are not measured: before and after would be minutes apart, on a machine that changes.
        """
        if self.texts.evaluation is None:
            return {}
        with placed([self.model], self.device, upcast=False):
            fresh = known or measure_quality(
                self.model, self.tokenizer, self.texts.evaluation, self.texts.bos, self.progress
            )
        return {**fresh, "peak_memory": peak_memory(self.device)}
