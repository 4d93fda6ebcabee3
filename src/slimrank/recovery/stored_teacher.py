"""Predictions of the original on disk: it runs over the text once, before training, and not in every step.

For windows to train on, each position has its most probable tokens and the mass of the others (`TopK`), in files that
are mapped into memory. For held-out windows the states after the last block are stored, which the output head of the
original turns into all logits: the held-out loss is the same number as without storing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slimrank.errors import RecipeError, RunError
from slimrank.methods.recoverer import RecoverOptions
from slimrank.models.contexts import evaluating
from slimrank.models.load import digest
from slimrank.processes import started_together
from slimrank.progress import Progress
from slimrank.recovery.head import Head
from slimrank.recovery.loss import positions_at_once, slices
from slimrank.recovery.machine import Machine
from slimrank.recovery.processes import join_others, rank, wait_for_all
from slimrank.recovery.teacher_memory import without_blocks
from slimrank.recovery.top_k import STORED, TopK, bytes_of
from slimrank.recovery.trainer import Windows
from slimrank.store import Store, content_key

FILE_BYTES = 2**26
HELD_OUT = "held-out"


class StoredTeacher:
    """The original's predictions on some windows, computed where they are not stored yet.

    Args:
        teacher: the original, on its device.
        text: windows to train on, and held-out ones.
        k: tokens of each position that are stored.
        machine: how it computes, and the folder to make one in, which is named after weights, windows, k and precision.

    Raises:
        RecipeError: k is more than the vocabulary.
        OutputError: the folder cannot be made.
    """

    def __init__(self, teacher: Any, text: tuple[Windows, Windows], k: int, machine: Machine) -> None:
        self.teacher, self.text, self.k, self.machine = teacher, text, k, machine
        self.head = Head(teacher)
        if k > self.head.vocabulary:
            raise RecipeError(
                f"teacher_top_k is {k}, and the vocabulary has {self.head.vocabulary} tokens.",
                "fewer: teacher_top_k=64",
            )
        join_others(machine.device)
        wait_for_all()  # the first process makes the run directory
        self.store = Store(machine.folder / f"teacher-{self._key()}")
        self.windows_a_file = max(1, FILE_BYTES // bytes_of(text[0].ids.shape[1], k))

    def _key(self) -> str:
        texts = [hashlib.sha256(part.ids.contiguous().numpy().tobytes()).hexdigest() for part in self.text]
        precision = self.machine.device.type, self.machine.bfloat16
        return content_key({"teacher": digest(self.teacher), "texts": texts, "k": self.k, "precision": precision})

    def write(self, progress: Progress) -> float:
        """Store what is not stored yet; several processes share the files. Return the seconds that it took.

        Raises:
            OutputError: the disk is full or cannot be written. What is stored by then is taken up by the next run.
        """
        start = time.perf_counter()
        missing = [name for name in self._names() if not self.store.has(name)]
        wait_for_all()  # none writes before all have looked
        mine = missing[rank() :: started_together()]
        progress.stage("store predictions of the original", sum(len(self._ids(name)) for name in mine))
        with evaluating(self.teacher), self.machine.autocast():
            for name in mine:
                self.store.save(name, self._computed(name, progress))
        wait_for_all()
        return time.perf_counter() - start

    def _names(self) -> list[str]:
        count = -(-len(self.text[0]) // self.windows_a_file)
        return [*(f"windows-{number}" for number in range(count)), HELD_OUT]

    def _ids(self, name: str) -> Tensor:
        """Return the windows of a file."""
        if name == HELD_OUT:
            return self.text[1].ids
        first = int(name.rpartition("-")[2]) * self.windows_a_file
        return self.text[0].ids[first : first + self.windows_a_file]

    def _computed(self, name: str, progress: Progress) -> dict[str, Tensor]:
        found = []
        for ids in self._ids(name):
            final = self.head.states(ids[None].to(self.machine.device))[0][0]
            found.append({"final": final.cpu()} if name == HELD_OUT else self._shortened(final))
            progress.step()
        return {part: torch.stack([window[part] for window in found]) for part in found[0]}

    def _shortened(self, final: Tensor) -> dict[str, Tensor]:
        """Return the distributions of a window, of its states after the last block, as they are stored."""
        rows = slices(len(final), positions_at_once(self.head.vocabulary))
        found = [TopK.of(self.head.logits(final[some]), self.k) for some in rows]
        top, tokens, tail = (torch.cat([getattr(part, n) for part in found]).cpu() for n in ("top", "tokens", "tail"))
        return {"top": top.to(STORED), "tokens": tokens, "tail": tail.float()}

    def windows(self) -> tuple[Windows, Windows]:
        """Return the text with the original's predictions."""
        train, held = self.text
        return Windows(train.ids, train.counted, self._trained_on), Windows(held.ids, held.counted, self._held_out)

    def _trained_on(self, index: int) -> dict[str, Tensor]:
        number, row = divmod(index, self.windows_a_file)
        return self._read(f"windows-{number}", row)

    def _held_out(self, index: int) -> dict[str, Tensor]:
        return self._read(HELD_OUT, index)

    def _read(self, name: str, row: int) -> dict[str, Tensor]:
        """Return one window of a file, which is mapped into memory.

        Raises:
            RunError: the file is absent or damaged.
        """
        path = self.store.folder / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_slice(key)[row] for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise RunError(f"'{path}' cannot be read: {error}", "delete the run directory and start again") from error

    @property
    def bytes(self) -> int:
        """Return the bytes of its files."""
        return sum(path.stat().st_size for path in self.store.folder.glob("*.safetensors"))


def seen(text: Windows, count: int, seed: int) -> Windows:
    """Return the windows that training is going to see: all, or `count` of them drawn at random."""
    if count >= len(text):
        return text
    rows = torch.randperm(len(text), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return Windows(text.ids[rows], text.counted[rows])


@dataclass(frozen=True)
class Predictions:
    """What is known of the original's predictions in training.

    Attributes:
        text: windows to train on and held-out ones, with what is stored.
        original: the original, or its head where its blocks are released.
        took: bytes on disk, and seconds that storing took; None where nothing is stored.
    """

    text: tuple[Windows, Windows]
    original: Any
    took: tuple[int, float] | None = None


@contextmanager
def predicted(
    teacher: Any, text: tuple[Windows, Windows], options: RecoverOptions, machine: Machine, progress: Progress
) -> Iterator[Predictions]:
    """Store the original's predictions if `teacher_top_k` is set, and release its blocks inside the context.

    Raises:
        RecipeError: `teacher_top_k` is more than the vocabulary.
        OutputError: the disk is full or cannot be written.
    """
    if options.teacher_top_k is None:
        yield Predictions(text, teacher)
        return
    count = len(text[0])
    if options.tokens is not None:
        count = max(1, options.tokens // text[0].ids.shape[1] // options.batch_size) * options.batch_size
    stored = StoredTeacher(teacher, (seen(text[0], count, machine.seed), text[1]), options.teacher_top_k, machine)
    seconds = stored.write(progress)
    progress.note(f"predictions of the original: {stored.bytes:,} bytes on disk, stored in {seconds:,.0f} s")
    with without_blocks(teacher, machine.teacher_again):
        yield Predictions(stored.windows(), stored.head, (stored.bytes, seconds))
