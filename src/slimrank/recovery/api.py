"""`recover`: train a compressed model towards its original, measure it, and write it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slimrank.checkpoint.output_folder import CARD, REPORTS, OutputFolder, need_space, write_manifest
from slimrank.checkpoint.save import save_model
from slimrank.errors import ModelError, RecipeError
from slimrank.evaluate.suite import Suite, compare
from slimrank.layers.base import compressed_layers
from slimrank.layers.quantized import quantized_layers
from slimrank.methods.recoverer import RECOVERERS, ConfiguredRecoverer
from slimrank.models.load import Loaded, digest, load_model
from slimrank.models.machine import measure_machine
from slimrank.models.placement import placed, resolve_device
from slimrank.models.storage import saved_bytes
from slimrank.processes import is_leader
from slimrank.progress import Progress
from slimrank.recovery.cost import Sizes, training_cost
from slimrank.recovery.machine import Machine
from slimrank.recovery.precision import computes_bfloat16
from slimrank.recovery.processes import check_sharding
from slimrank.recovery.record import RecoveryRecord, page, write_record
from slimrank.recovery.recovering import run_phases
from slimrank.recovery.request import Recovery
from slimrank.recovery.text import check_text, measured_text, training_text
from slimrank.recovery.trainer import Windows
from slimrank.report.build import environment
from slimrank.store import Run, content_key, remove_run, usable_folder, write_text
from slimrank.text.texts import window_length

PLAN = "plan.json"


@dataclass(frozen=True)
class RecoveryResult:
    """What `recover` returns.

    Attributes:
        model: the trained model.
        tokenizer: its tokenizer.
        record: what was done.
        out: the folder that was written.
    """

    model: Any
    tokenizer: Any
    record: RecoveryRecord
    out: Path


@dataclass(frozen=True)
class _Job:
    """What was loaded for a recovery."""

    asked: Recovery
    method: ConfiguredRecoverer
    student: Loaded
    teacher: Loaded
    original: str
    progress: Progress

    @property
    def on_device(self) -> list[Any]:
        """Return the models that compute as a whole."""
        return [] if self.method.method.by_block else [self.student.model, self.teacher.model]

    def announce(self, text: Windows, place: torch.device) -> int:
        """Tell what training on a text is going to take; return the bytes that it stores."""
        distinct, seq_len = text.ids.numel(), text.ids.shape[1]
        tokens = self.method.training.tokens or distinct
        sizes = Sizes.of(self.student.model, self.teacher.model)
        cost = training_cost(sizes, self.method, tokens, seq_len, distinct)
        machine = measure_machine(place, False)
        float32 = self.method.training.compute_dtype == "float32"
        minutes = cost.operations / (machine.float32 if float32 else machine.mixed) / 60
        self.progress.note(
            f"training on {tokens:,} tokens: about {minutes:,.0f} minutes, {cost.peak / 1e9:,.1f} GB of memory besides "
            f"the two models, and {cost.stored / 1e9:,.1f} GB of disk until it ends"
            + (f", of which the original's predictions take {cost.predictions / 1e9:,.2f}" if cost.predictions else "")
        )
        return cost.stored

    @property
    def reader(self) -> tuple[Any, Any]:
        return self.student.model, self.student.tokenizer

    def measured(self, suite: Suite) -> dict[str, Any]:
        """Measure the student beside the teacher."""
        if not suite.texts:
            return {}
        both = self.student.model, self.teacher.model
        found: dict[str, Any] = compare(*both, self.student.tokenizer, suite, self.progress)[1]["texts"]
        return found


def recover(
    model: str | Path,
    teacher: str | Path | None = None,
    *,
    out: str | Path,
    progress: Progress | None = None,
    **options: Any,
) -> RecoveryResult:
    """Train a compressed model towards its original. Ranks and sizes stay, unless the method says so.

    Args:
        model: the folder of the compressed model.
        teacher: the original; by default the one that the folder's report names.
        out: folder to write the result to.
        progress: told what happens.
        options: fields of `Recovery`, and these two. `run_dir`: folder for states of training, in which an interrupted
            run goes on; by default `OUT.run`, which is removed at the end. `overwrite`: replace what slimrank wrote to
            `out` before.

    Raises:
        SlimrankError: an unknown option or method, a model that cannot be trained, another teacher, too little text,
            a loss that is not finite, a disk that is full.
    """
    run_dir, overwrite = options.pop("run_dir", None), options.pop("overwrite", False)
    asked, progress = Recovery.make(options), progress or Progress()
    method = RECOVERERS.get(asked.method).configured(asked.options)
    check_sharding(place := resolve_device(asked.device))
    output = OutputFolder(Path(out), overwrite)
    if is_leader():
        output.rehearse()
    check_text(asked)
    job = _loaded(asked, method, Path(model), teacher, progress)
    seq_len = window_length(job.student.model, asked.seq_len)
    text, suite = training_text(asked, method.training, job.reader, seq_len), measured_text(asked, job.reader, seq_len)
    size = saved_bytes(job.student.model)
    stored = job.announce(text[0], place)
    bfloat16 = computes_bfloat16(method.training, place)
    with _states(job, output, run_dir, stored) as folder, placed(job.on_device, place, upcast=False):
        before = job.measured(suite)
        machine = Machine(folder, place, bfloat16, asked.seed, asked.report_to, bool(suite.texts))
        phases = run_phases(job.student.model, job.teacher.model, text, method, machine, progress)
        after = job.measured(suite)
        sizes = size, saved_bytes(job.student.model)
        record = RecoveryRecord(str(model), job.original, asked, phases, before, after, sizes)
        if is_leader():
            _write(job, output, record)
    return RecoveryResult(job.student.model, job.student.tokenizer, record, output.path)


def _loaded(
    asked: Recovery, method: ConfiguredRecoverer, model: Path, teacher: str | Path | None, progress: Progress
) -> _Job:
    """Load the student and its teacher."""
    original = str(teacher) if teacher is not None else _original_of(model)
    progress.note(f"loading {model} and {original}")
    student, dense = (load_model(each, asked.dtype, progress) for each in (model, original))
    job = _Job(asked, method, student, dense, original, progress)
    check_pair(job.student.model, job.teacher.model)
    job.teacher.model.requires_grad_(False)
    return job


def _write_card(output: OutputFolder, record: RecoveryRecord, folder: Path) -> None:
    """Write the model card of the compressed model with what recovery did; a card of someone else stays."""
    before = Path(record.model) / CARD
    if not output.keeps_card and before.is_file():
        write_text(folder / CARD, f"{before.read_text(encoding='utf-8').rstrip()}\n\n{page(record, level=2)}")


def _original_of(folder: Path) -> str:
    """Return the model that a folder's report names.

    Raises:
        ModelError: there is no such folder.
        RecipeError: it has no report.
    """
    if not folder.is_dir():
        raise ModelError(f"there is no folder '{folder}'.", "the folder of a compressed model")
    try:
        return str(json.loads((folder / REPORTS[0]).read_text(encoding="utf-8"))["model"]["name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"'{folder}' has no {REPORTS[0]} that names its original.", "--teacher MODEL: the model that was compressed"
        ) from error


def check_pair(student: Any, teacher: Any) -> None:
    """Make sure that a model can be trained towards another.

    Raises:
        ModelError: the first has no compressed layers, or integers, or they are not of one architecture and vocabulary.
    """
    if quantized_layers(student):
        raise ModelError(
            "the model is quantised, and integers are not trained.",
            "slimrank compress MODEL --recover distill --quantize int4-g64 trains before it rounds",
        )
    if not compressed_layers(student):
        raise ModelError("the model has no compressed layers.", "slimrank compress MODEL --keep 0.8 first")
    mine, other = student.config.get_text_config(), teacher.config.get_text_config()
    for name in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
        found = getattr(mine, name, None), getattr(other, name, None)
        if found[0] != found[1]:
            raise ModelError(
                f"the teacher is another model: its {name} is {found[1]}, and that of the student {found[0]}.",
                "--teacher MODEL: the model that was compressed",
            )


@contextmanager
def _states(job: _Job, output: OutputFolder, run_dir: str | Path | None, size: int) -> Iterator[Path]:
    """Yield a folder for states of that size; one that nobody named is removed at the end."""
    own = output.path.with_name(output.path.name + ".run")
    folder = usable_folder(run_dir if run_dir is not None else own, output.path)
    if not is_leader():
        yield folder / "store" / "recovery"
        return
    asked = job.asked.model_dump(mode="json", exclude={"evaluation", "windows", "report_to", "max_shard_size"})
    models = {"model": digest(job.student.model), "teacher": digest(job.teacher.model)}
    with Run(folder, {"recover": content_key({**models, "asked": asked})}):
        there = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))  # of an interrupted run
        need_space(folder, size - there)
        yield folder / "store" / "recovery"
    if run_dir is None:
        remove_run(own)


def _write(job: _Job, output: OutputFolder, record: RecoveryRecord) -> None:
    """Write the model and what was done."""
    with output.writing() as partial:
        for note in save_model(job.student.model, job.student.tokenizer, partial, job.asked.max_shard_size):
            job.progress.note(note)
        for name in (PLAN, *REPORTS):
            if (Path(record.model) / name).is_file():
                shutil.copy2(Path(record.model) / name, partial / name)
        write_record(record, partial)
        _write_card(output, record, partial)
        write_manifest(partial, {**environment(), "recovery": record.asked.model_dump(mode="json")})
