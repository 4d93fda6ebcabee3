"""What a compression costs, estimated before it is paid: the units that stages state their costs in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from slimrank.evaluate.perplexity import LOGITS_AT_ONCE
from slimrank.models.machine import Machine
from slimrank.models.structure import find_blocks, parameters_of
from slimrank.models.targets import Target

if TYPE_CHECKING:
    from slimrank.pipeline.prepare import Prepared
    from slimrank.pipeline.stage import Stage
    from slimrank.text.texts import WindowRequest

GRAM_SHARE = 0.6  # of a full product, since only the upper panels are computed
LIBRARIES = 400_000_000  # bytes that a process takes with torch and transformers loaded
DISK_BYTES_PER_SECOND = 1e9


@dataclass(frozen=True)
class Cost:
    """What a stage takes.

    Attributes:
        float32: operations in single precision.
        float64: operations in double precision.
        products: operations of the blocks' products, in the precision that blocks are computed in.
        mixed: operations of training, in mixed precision.
        written: bytes written to disk at the end.
        peak: bytes of memory at most, besides the libraries and the weights of the model.
        stored: bytes that it leaves in the run directory.
    """

    float32: float = 0.0
    float64: float = 0.0
    products: float = 0.0
    mixed: float = 0.0
    written: float = 0.0
    peak: int = 0
    stored: int = 0

    def seconds(self, machine: Machine) -> float:
        """Estimate the time on a machine."""
        solved = self.float32 / machine.float32 + self.float64 / machine.float64
        products = self.products / machine.products + self.mixed / machine.mixed
        return solved + products + self.written / DISK_BYTES_PER_SECOND


@dataclass(frozen=True)
class Shape:
    """The sizes that costs follow from.

    Attributes:
        targets: the weights to compress.
        matrices: parameters of all matrices in the blocks.
        head: parameters of the output head.
        parameters: those of the whole model.
        blocks: decoder blocks of the model.
        vocabulary: tokens that the head tells apart.
        seq_len: tokens of a window.
        batch_tokens: tokens that run through a block at a time.
        tokens: text tokens by the name of their request.
        itemsize: bytes per stored parameter.
        upcast: blocks are computed in float32.
        resident: the whole model is on the device at once.
        resumable: finished parts are stored.
        keeps_statistics: statistics are stored, too.
    """

    targets: tuple[Target, ...]
    matrices: int
    head: int
    parameters: int
    blocks: int
    vocabulary: int
    seq_len: int
    batch_tokens: int
    tokens: Mapping[str, int]
    itemsize: int
    upcast: bool
    resident: bool
    resumable: bool = True
    keeps_statistics: bool = False

    @classmethod
    def of(cls, prepared: Prepared, tokens: Mapping[str, int], **stored: bool) -> Shape:
        """Read the sizes off a prepared recipe; `stored`: whether it is resumable, and keeps statistics."""
        model, recipe, seq_len = prepared.model, prepared.recipe, prepared.recipe.seq_len or 0
        head: Any = model.get_output_embeddings()
        return cls(
            targets=prepared.targets.targets,
            matrices=prepared.targets.coverage.matrices,
            head=parameters_of(head) if head is not None else 0,
            parameters=prepared.targets.coverage.total,
            blocks=len(find_blocks(model)[1]),
            vocabulary=model.config.get_text_config().vocab_size,
            seq_len=seq_len,
            batch_tokens=recipe.batch_size * seq_len,
            tokens=tokens,
            itemsize=prepared.dtype.itemsize,
            upcast=prepared.upcast,
            resident=recipe.resident,
            **stored,
        )

    @property
    def width(self) -> int:
        """Return the numbers in a hidden state."""
        return self.targets[0].shape[1]

    @property
    def widest(self) -> int:
        """Return the longer side of the largest target."""
        return max(max(t.shape) for t in self.targets)

    @property
    def logits(self) -> int:
        """Return the elements of the logits of one evaluation pass."""
        return max(LOGITS_AT_ONCE, self.seq_len * self.vocabulary)

    @cached_property
    def first(self) -> list[Target]:
        """Return the targets of the first block that has any."""
        block = min(t.block for t in self.targets)
        return [t for t in self.targets if t.block == block]

    @property
    def compressed_blocks(self) -> int:
        """Return the number of blocks that have targets."""
        return len({t.block for t in self.targets})

    @property
    def compute_bytes(self) -> int:
        """Return the bytes of a number while a block is computed."""
        return 4 if self.upcast else self.itemsize

    @property
    def copies(self) -> int:
        """Return the bytes of the weight copies that are computed in another dtype than the stored one."""
        if self.compute_bytes == self.itemsize:
            return 0
        block = self.matrices // max(1, self.compressed_blocks) * self.compute_bytes
        return self.parameters * self.compute_bytes if self.resident else block

    @property
    def solving(self) -> int:
        """Return the bytes that the largest eigenproblem takes."""
        return 8 * 5 * self.widest * min(self.widest, max(min(t.shape) for t in self.targets))

    def forward(self, tokens: float) -> float:
        """Count the operations of a forward pass through the blocks."""
        return 2.0 * tokens * self.matrices

    def through(self, tokens: float) -> float:
        """Count the operations of a forward pass through the blocks and the head."""
        return self.forward(tokens) + self.logits_of(tokens)

    def logits_of(self, tokens: float) -> float:
        """Count the operations of the output head."""
        return 2.0 * tokens * self.head

    def grams(self, tokens: int) -> float:
        """Count the operations of the grams of all layers' inputs."""
        return 2 * GRAM_SHARE * tokens * sum(n * n for n in group_widths(self.targets))

    def decompose(self) -> float:
        """Count the operations of one eigenproblem for every target."""
        return sum(solve_flops(*t.shape) for t in self.targets)


def expected_tokens(requests: Iterable[WindowRequest], seq_len: int) -> dict[str, int]:
    """Count the tokens of each request where the text is long enough."""
    return {request.name: request.count * seq_len for request in requests}


def timetable(stages: Iterable[Stage], prepared: Prepared, shape: Shape) -> dict[str, Cost]:
    """Return the cost of every part by its title, in the order in which the parts run."""
    stages, costs = list(stages), dict[str, Cost]()
    first = next((stage for stage in stages if stage.factorizes), None)
    for stage in stages:
        if stage is first:
            found = {other.before_title: other.cost_before(prepared, shape) for other in stages if other.before_title}
            costs |= {title: cost for title, cost in found.items() if cost is not None}
        cost = stage.cost(prepared, shape)
        if cost is not None:
            costs[stage.title] = cost
    return costs


def group_widths(targets: Iterable[Target]) -> list[int]:
    """Guess the input widths of the groups that share a gram, without running the model.

    Siblings of equal width form a group, except the last to run. Calibration itself groups layers by the identity
    of their input tensors.
    """
    seen: dict[tuple[str, int], int] = {}
    for target in targets:
        n = target.shape[1]
        seen.setdefault((target.path.rpartition(".")[0], n), n)
    return list(seen.values())


def solve_flops(m: int, n: int) -> float:
    """Count the operations of the eigenproblem of an m x n weight."""
    k, widest = min(m, n), max(m, n)
    return 40 * k**3 + 4 * k * k * widest + (2 * k * widest * widest if n > m else 0)
