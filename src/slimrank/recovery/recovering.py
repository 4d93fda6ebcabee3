"""Run the phases of a recovery method; weights that do not get better on held-out text stay as they were."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import EarlyStoppingCallback

from slimrank.errors import SlimrankError
from slimrank.methods.recoverer import ConfiguredRecoverer, Phase
from slimrank.models.structure import find_blocks
from slimrank.processes import is_leader
from slimrank.progress import Progress
from slimrank.recovery.blocks import BlockWork
from slimrank.recovery.loss import Terms
from slimrank.recovery.machine import Machine
from slimrank.recovery.processes import wait_for_all
from slimrank.recovery.stored_teacher import predicted
from slimrank.recovery.student import Student
from slimrank.recovery.trainer import (
    TRAINED,
    LastCheck,
    Told,
    Windows,
    arguments,
    held_out_loss,
    load_trained,
    train,
    trained_state,
)
from slimrank.store import disk_error


@dataclass(frozen=True)
class PhaseRecord:
    """What one phase of training did.

    Attributes:
        name: what was trained, in words.
        parameters: how many.
        tokens: trained on.
        seconds: of training.
        before: held-out loss, nats a token.
        after: the same after it.
        kept: whether it became lower; else the weights are as before.
        curve: rows of (step, loss in training or None, held-out loss or None).
        stored: bytes of the original's predictions on disk, and seconds that storing took; None where they are
            computed in every step. With them the loss in training is that of k + 1 events.
    """

    name: str
    parameters: int
    tokens: int
    seconds: float
    before: float
    after: float
    kept: bool
    curve: list[tuple[int, float | None, float | None]] = field(default_factory=list)
    stored: tuple[int, float] | None = None

    def plain(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        return asdict(self)

    def row(self) -> tuple[str, ...]:
        """Return it as the cells of a table, without the curve."""
        speed = self.tokens / max(self.seconds, 1e-9)
        counts = f"{self.parameters:,}", f"{self.tokens:,}", f"{speed:,.0f}"
        return (self.name, *counts, f"{self.before:.4f}", f"{self.after:.4f}", "yes" if self.kept else "no")


def run_phases(
    model: Any,
    teacher: Any,
    text: tuple[Windows, Windows],
    method: ConfiguredRecoverer,
    machine: Machine,
    progress: Progress | None = None,
) -> list[PhaseRecord]:
    """Train a model in place.

    Args:
        model: compressed; its weights are trained in float32 and keep their dtype.
        teacher: the original, on the same device.
        text: windows to train on, and held-out ones.
        method: what is trained, and how.
        machine: where and how it computes.
        progress: told what happens.

    Raises:
        NonFiniteError: a loss that is not finite.
        ModelError: a model that the method cannot train.
        OutputError: states cannot be stored.
    """
    try:
        return _run_phases(model, teacher, text, method, machine, progress or Progress())
    except (OSError, SafetensorError) as error:
        raise error if isinstance(error, SlimrankError) else disk_error(error, machine.folder) from error


def _run_phases(
    model: Any,
    teacher: Any,
    text: tuple[Windows, Windows],
    method: ConfiguredRecoverer,
    machine: Machine,
    progress: Progress,
) -> list[PhaseRecord]:
    found: list[PhaseRecord] = []
    predictions = predicted(teacher, text, method.training, machine, progress)
    with _in_float32(model), _as_before(model), predictions as known:
        work = BlockWork(model, teacher, known.text, machine.device) if method.method.by_block else None
        for number, (name, end) in enumerate(_seeded(method.phases(model, _block_paths(model)), machine.seed)):
            student, mine = (_whole(model, known.original, method), known.text) if work is None else work.begin()
            phase = _Phase(name, model, student, mine, method, machine.folder / f"phase-{number}")
            record = phase.run(machine, progress, tokens=text[0].ids.shape[1])
            found.append(replace(record, stored=known.took))
            end(found[-1].kept)
            if work is not None:
                work.end()
    return found


def _block_paths(model: Any) -> list[str]:
    path, blocks = find_blocks(model)
    return [f"{path}.{index}" for index in range(len(blocks))]


def _seeded(phases: Phase, seed: int) -> Iterator[tuple[str, Callable[[bool], None]]]:
    """Yield the name of each phase, and what is to be called with whether it was kept.

    Random numbers of a phase depend on the seed alone, also where an earlier phase was taken from its states.
    """
    answer: list[bool | None] = [None]
    with closing(phases):
        while True:
            torch.manual_seed(seed)
            try:
                name = phases.send(answer[0])  # type: ignore[arg-type]  # None starts it
            except StopIteration:
                return
            yield name, lambda kept: answer.__setitem__(0, kept)


def _whole(model: Any, teacher: Any, method: ConfiguredRecoverer) -> Student:
    """Return a student of the whole model."""
    options = method.training
    wanted = teacher if options.kl or options.hidden else None
    return Student(model, wanted, Terms(options.kl, options.label), options.hidden)


@dataclass
class _Phase:
    """One phase: what is trained has gradients already."""

    name: str
    model: Any
    student: nn.Module
    text: tuple[Windows, Windows]
    method: ConfiguredRecoverer
    folder: Path

    def run(self, machine: Machine, progress: Progress, tokens: int) -> PhaseRecord:
        """Train, and keep the best state if it is better than the first; windows have so many tokens."""
        options, student = self.method.training, self.student
        how = arguments(
            options,
            options.tokens // tokens if options.tokens else len(self.text[0]),
            self.folder,
            seed=machine.seed,
            report_to=list(machine.report_to) or "none",
            use_cpu=machine.device.type == "cpu",
            bf16=machine.bfloat16,
        )
        before = self._started(student, machine.bfloat16)
        progress.stage(f"train {self.name}", how.max_steps)
        start = time.perf_counter()
        with _recomputing(self.model, options.checkpointing):
            told = (LastCheck(), Told(progress), EarlyStoppingCallback(options.patience))
            after, log = train(student, self.text, how, options.optimizer, told)
        seconds = time.perf_counter() - start
        if kept := after < before:
            progress.note(f"{self.name}: held-out loss {before:.4f} before, {after:.4f} after")
        else:
            load_trained(student, self.folder)
            progress.note(f"{self.name}: the held-out loss did not fall ({before:.4f}); the weights stay as they were")
        wait_for_all()
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        steps = max((int(row["step"]) for row in log), default=0)
        return PhaseRecord(
            self.name, trained, steps * options.batch_size * tokens, seconds, before, after, kept, _curve(log)
        )

    def _started(self, student: nn.Module, bfloat16: bool) -> float:
        """Store the first state, if no earlier run has; return its held-out loss."""
        if (self.folder / TRAINED).is_file():
            load_trained(student, self.folder)
            return held_out_loss(student, self.text[1], bfloat16)
        if is_leader():
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / f"{TRAINED}.partial"
            save_file(trained_state(student), partial)
            partial.rename(self.folder / TRAINED)
        return held_out_loss(student, self.text[1], bfloat16)


def _curve(log: list[dict[str, Any]]) -> list[tuple[int, float | None, float | None]]:
    rows = [row for row in log if "loss" in row or "eval_loss" in row]
    return [(int(row["step"]), row.get("loss"), row.get("eval_loss")) for row in rows]


@contextmanager
def _in_float32(model: Any) -> Iterator[None]:
    """Hold weights in float32 inside the context, and in their own dtype after it."""
    own = {id(p): p.dtype for p in model.parameters()}
    small = [p for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)]
    dtype = small[0].dtype if small else None
    for p in small:
        p.data = p.data.float()
    try:
        yield
    finally:
        for p in model.parameters():  # those of adapters that were merged have gone, and new factors have come
            p.data = p.data.to(own.get(id(p), dtype or p.dtype))


@contextmanager
def _as_before(model: Any) -> Iterator[None]:
    """Restore the modes of modules, and which parameters have gradients; new ones have."""
    wanted: dict[int, bool] = {id(p): p.requires_grad for p in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for p in model.parameters():
            p.requires_grad_(wanted.get(id(p), True))
            p.grad = None
        for module in model.modules():
            module.training = modes.get(module, model.training)


@contextmanager
def _recomputing(model: Any, wanted: bool) -> Iterator[None]:
    """Compute blocks again in the backward pass inside the context."""
    word = (
        "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    )  # renamed in transformers 5
    if wanted:
        getattr(model, f"{word}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        if wanted:
            getattr(model, f"{word}_checkpointing_disable")()
