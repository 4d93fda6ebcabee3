"""What training takes, estimated before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from slimrank.methods.recoverer import ConfiguredRecoverer
from slimrank.models.structure import find_blocks, parameters_of
from slimrank.recovery.loss import positions_at_once
from slimrank.recovery.request import Recovery
from slimrank.text.chats import Chat
from slimrank.text.reading import read_parts

CHARACTERS = 4.2  # of a token, in English
FLOAT32 = 4
STATES = 4  # float32 numbers for each trained one: itself, its gradient and two moments
LOGITS = 3  # of one part, float32: those of both models, and the gradient
SAVED = 6  # bytes of each input and output of a matrix that the backward pass needs
OVERHEAD = 2.0  # measured: seconds of a step over those of its products


@dataclass(frozen=True)
class Sizes:
    """The sizes that the cost of training follows from.

    Attributes:
        original: parameters of the matrices in the original's blocks.
        student: parameters of those of the compressed model.
        sides: inputs and outputs of the latter, added up.
        whole: parameters of the whole compressed model.
        head: parameters of the output head.
        vocabulary: tokens that it tells apart.
    """

    original: int
    student: int
    sides: int
    whole: int
    head: int
    vocabulary: int

    @classmethod
    def of(cls, student: Any, teacher: Any) -> Sizes:
        """Return the sizes of two models."""
        mine, other = (_matrices(model) for model in (student, teacher))
        head = student.get_output_embeddings()
        return cls(
            original=sum(m * n for m, n in other),
            student=sum(m * n for m, n in mine),
            sides=sum(m + n for m, n in mine),
            whole=sum(p.numel() for p in student.parameters()),
            head=parameters_of(head) if head is not None else 0,
            vocabulary=student.config.get_text_config().vocab_size,
        )


@dataclass(frozen=True)
class TrainingCost:
    """What training takes.

    Attributes:
        operations: of its products.
        peak: bytes of memory, besides the two models.
        stored: bytes of its states on disk.
    """

    operations: float
    peak: int
    stored: int


def training_cost(sizes: Sizes, method: ConfiguredRecoverer, tokens: int, seq_len: int) -> TrainingCost:
    """Estimate what it takes to train on so many tokens, in windows of `seq_len`."""
    options = method.training
    passes = 4 if options.checkpointing else 3
    through_head = 0 if method.method.by_block else sizes.head
    products = sizes.original + passes * sizes.student + 3 * through_head
    at_once = (options.micro_batch or options.batch_size) * seq_len
    kept = 1 if options.checkpointing else SAVED * sizes.sides
    positions = 0 if method.method.by_block else min(at_once, positions_at_once(sizes.vocabulary))
    logits = LOGITS * FLOAT32 * positions * sizes.vocabulary
    states = STATES * FLOAT32 * sizes.whole
    operations = OVERHEAD * 2.0 * method.method.rounds * tokens * products
    return TrainingCost(operations, states + at_once * kept + logits, states)


def expected_tokens(asked: Recovery, options: Any) -> int:
    """Return the tokens to train on; those of a text that is read once are estimated from its characters."""
    if options.tokens is not None:
        return int(options.tokens)
    parts = read_parts(asked.text, "training", chat=asked.chat)
    return int(sum(_characters(part.documents or ()) for part in parts) / CHARACTERS)


def _characters(documents: Sequence[Any]) -> int:
    return sum(len(str(d.messages)) if isinstance(d, Chat) else len(d) for d in documents)


def _matrices(model: Any) -> list[tuple[int, int]]:
    """Return the shapes of all matrices in the blocks of a model."""
    blocks: nn.ModuleList = find_blocks(model)[1]
    return [(p[0].numel(), p.numel() // p[0].numel()) for p in blocks.parameters() if p.dim() > 1]
