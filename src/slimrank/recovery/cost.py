"""What training takes, estimated before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from slimrank.methods.recoverer import ConfiguredRecoverer, RecoverOptions
from slimrank.models.structure import find_blocks, parameters_of
from slimrank.recovery.loss import positions_at_once
from slimrank.recovery.request import Recovery
from slimrank.recovery.text import has_end
from slimrank.recovery.top_k import bytes_of
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
        stored: bytes of its states on disk, and of the original's predictions.
        predictions: bytes of the latter alone.
        before: bytes of memory while these are stored, besides the two models.
    """

    operations: float
    peak: int
    stored: int
    predictions: int = 0
    before: int = 0


def training_cost(
    sizes: Sizes, method: ConfiguredRecoverer, tokens: int, seq_len: int, distinct: int | None = None
) -> TrainingCost:
    """Estimate what it takes to train.

    Args:
        sizes: of the two models.
        method: what is trained, and how.
        tokens: to train on.
        seq_len: tokens of a window.
        distinct: how many of the tokens are different ones; by default all, in a single epoch.
    """
    options, rounds = method.training, method.method.rounds
    passes = 4 if options.checkpointing else 3
    through_head = 0 if method.method.by_block else sizes.head
    once = min(tokens, tokens if distinct is None else distinct)
    of_original = rounds * tokens if options.teacher_top_k is None else once
    products = of_original * (sizes.original + through_head)
    products += rounds * tokens * (passes * sizes.student + 2 * through_head)
    at_once = (options.micro_batch or options.batch_size) * seq_len
    kept = 1 if options.checkpointing else SAVED * sizes.sides
    positions = 0 if method.method.by_block else min(at_once, positions_at_once(sizes.vocabulary))
    logits = LOGITS * FLOAT32 * positions * sizes.vocabulary
    states = STATES * FLOAT32 * sizes.whole
    predictions = _predictions(options, once, seq_len, sizes)
    return TrainingCost(
        operations=OVERHEAD * 2.0 * products,
        peak=states + at_once * kept + logits,
        stored=states + predictions,
        predictions=predictions,
        before=FLOAT32 * sizes.whole + logits if predictions else 0,
    )


def _predictions(options: RecoverOptions, tokens: int, seq_len: int, sizes: Sizes) -> int:
    """Return the bytes of the original's predictions on so many tokens, and of its states on held-out ones."""
    if options.teacher_top_k is None:
        return 0
    width = sizes.head // sizes.vocabulary
    return bytes_of(tokens, options.teacher_top_k) + options.held_out * seq_len * width * FLOAT32


def expected_tokens(asked: Recovery, options: RecoverOptions) -> tuple[int, int]:
    """Return how many tokens are trained on, and how many of these are different ones.

    Those of a text that is read as a whole are estimated from its characters.
    """
    parts = read_parts(asked.text, "training", chat=asked.chat)
    whole = int(sum(_characters(part.documents or ()) for part in parts) / CHARACTERS)
    tokens = whole if options.tokens is None else options.tokens
    return tokens, min(tokens, whole) if has_end(asked) else tokens


def _characters(documents: Sequence[Any]) -> int:
    return sum(len(str(d.messages)) if isinstance(d, Chat) else len(d) for d in documents)


def _matrices(model: Any) -> list[tuple[int, int]]:
    """Return the shapes of all matrices in the blocks of a model."""
    blocks: nn.ModuleList = find_blocks(model)[1]
    return [(p[0].numel(), p.numel() // p[0].numel()) for p in blocks.parameters() if p.dim() > 1]
