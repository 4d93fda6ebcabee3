"""The training loop: transformers' Trainer, with states that hold only what is trained."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from slimrank.errors import NonFiniteError, RecipeError, first_line
from slimrank.methods.recoverer import RecoverOptions
from slimrank.models.contexts import evaluating
from slimrank.processes import is_leader, started_together
from slimrank.progress import Progress
from slimrank.recovery.optimizer import optimizer_of
from slimrank.store import write_text

TRAINED = "trained.safetensors"
DONE = "done.json"
WARMUP_STEPS = 10  # at least, if the run has twice as many: the first steps of AdamW do not know the gradients' size


class Windows(Dataset[dict[str, Tensor]]):
    """Windows of tokens.

    Args:
        ids: the tokens (windows x tokens).
        counted: which of their predictions count, of the same shape.
        aims: returns what is known of the original's predictions for the window of an index, as `Student` takes it.
    """

    def __init__(self, ids: Tensor, counted: Tensor, aims: Callable[[int], dict[str, Tensor]] | None = None) -> None:
        self.ids, self.counted, self.aims = ids, counted, aims

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        known = {} if self.aims is None else self.aims(index)
        return {"input_ids": self.ids[index], "counted": self.counted[index], **known}


class RecoveryTrainer(Trainer):
    """Trains a `Student`. A loss that is not finite ends it."""

    def compute_loss(self, model: Any, inputs: Any, *others: Any, **options: Any) -> Any:
        """See `Trainer`.

        Raises:
            NonFiniteError: the loss is not finite; it names the step and the first block whose output is not.
        """
        loss = super().compute_loss(model, inputs, *others, **options)
        plain = loss[0] if isinstance(loss, tuple) else loss
        if not bool(torch.isfinite(plain)):
            where = self.accelerator.unwrap_model(model).broken(inputs["input_ids"])
            kept = self.state.best_model_checkpoint
            good = f"; the best state so far is in {kept}" if kept else ""
            raise NonFiniteError(
                f"the loss of step {self.state.global_step + 1} is not finite{where}.",
                f"a lower learning_rate, or compute_dtype=float32{good}",
            )
        return loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Compute the held-out loss, in every process for itself."""
        assert isinstance(self.eval_dataset, Windows)
        found = held_out_loss(self.accelerator.unwrap_model(self.model), self.eval_dataset, bool(self.args.bf16))
        metrics = {"eval_loss": found}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trained_state(self.accelerator.unwrap_model(self.model), state_dict), folder / TRAINED)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        except RuntimeError as error:  # torch.save reports a full disk so
            raise OSError(f"the state of the optimiser was not written whole ({first_line(error)})") from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


class Told(TrainerCallback):
    """Tells a progress of steps and held-out losses."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """See `TrainerCallback`."""
        self.progress.step()

    def on_evaluate(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """See `TrainerCallback`."""
        self.progress.note(f"step {state.global_step}: held-out loss {others['metrics']['eval_loss']:.4f}")


class LastCheck(TrainerCallback):
    """Looks at the held-out loss after the last step, too."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See `TrainerCallback`."""
        control.should_evaluate |= state.global_step >= state.max_steps


@torch.no_grad()
def held_out_loss(student: nn.Module, text: Windows, bfloat16: bool) -> float:
    """Return the mean loss of a student over windows."""
    device = next(student.parameters()).device
    total, count = 0.0, 0.0
    with evaluating(student), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        for index in range(len(text)):
            window = {name: tensor[None].to(device) for name, tensor in text[index].items()}
            weight = float(window["counted"].sum())
            total += weight * float(student(**window)["loss"])
            count += weight
    return total / max(count, 1.0)


def trained_state(model: nn.Module, state: Any = None) -> dict[str, Tensor]:
    """Return the parameters that are trained, by name; from a gathered state, if there is one."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    found = dict(model.named_parameters()) if state is None else state
    return {name: found[name].detach().cpu().contiguous() for name in names}


@torch.no_grad()
def load_trained(model: nn.Module, folder: Path) -> None:
    """Put the parameters of a stored state into a model."""
    held = dict(model.named_parameters())
    for name, tensor in load_file(folder / TRAINED).items():
        held[name].copy_(tensor)


def arguments(options: RecoverOptions, windows: int, folder: Path, **machine: Any) -> TrainingArguments:
    """Return the arguments of the Trainer.

    Args:
        options: of training.
        windows: to train on, in all.
        folder: for states.
        machine: `seed`, `report_to`, `use_cpu` and `bf16`.

    Raises:
        RecipeError: the windows of a step cannot be divided as asked.
    """
    steps, processes = max(1, windows // options.batch_size), started_together()
    micro = options.micro_batch or max(1, options.batch_size // processes)
    if options.batch_size % (micro * processes):
        raise RecipeError(
            f"a step of {options.batch_size} windows cannot be divided into parts of {micro} in {processes} processes.",
            "another batch_size or micro_batch",
        )
    every = max(1, math.ceil(steps / options.checks))
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=options.batch_size // (micro * processes),
        learning_rate=options.learning_rate,
        max_grad_norm=options.clip,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": options.final_rate},
        warmup_steps=min(max(round(options.warmup * steps), WARMUP_STEPS), steps // 2),
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=every,
        save_steps=every,
        logging_steps=max(1, every // 5),
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        logging_nan_inf_filter=False,
        **machine,
    )


def train(
    student: nn.Module, text: tuple[Windows, Windows], how: TrainingArguments, optimizer: str, told: Sequence[Any]
) -> tuple[float, list[Any]]:
    """Train a student; its best state is kept. Return the held-out loss of that state, and what was logged.

    A state in the folder of the arguments is gone on from.

    Args:
        student: gives its own loss.
        text: windows to train on, and held-out ones.
        how: arguments of the Trainer.
        optimizer: name of the optimiser.
        told: callbacks.
    """
    folder = Path(str(how.output_dir))
    if (folder / DONE).is_file():  # Trainer would go on for a step
        ended = json.loads((folder / DONE).read_text(encoding="utf-8"))
        if ended["best"]:
            load_trained(student, folder / ended["best"])
        return float(ended["loss"]), list(ended["log"])
    trainer = RecoveryTrainer(
        model=student, args=how, train_dataset=text[0], eval_dataset=text[1], callbacks=[*told],
        optimizers=(optimizer_of(optimizer, student, how.learning_rate), None),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_state(folder))
    best, loss, log = trainer.state.best_model_checkpoint, trainer.state.best_metric, list(trainer.state.log_history)
    ended = {"best": Path(best).name if best else None, "loss": inf if loss is None else loss, "log": log}
    if is_leader():
        write_text(folder / DONE, json.dumps(ended))
    return float(ended["loss"]), log


def last_state(folder: Path) -> str | None:
    """Return the latest whole state in a folder."""
    states = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return str(max(states, key=lambda path: int(path.name.rpartition("-")[2]))) if states else None
