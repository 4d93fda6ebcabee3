"""What a compression will cost, said before it is paid: seconds per stage, and peak memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from slimrank.models.targets import Target

GRAM_SHARE = 0.6  # of a full product, since only the upper panels are computed
LIBRARIES = 400_000_000  # bytes that a process takes with torch and transformers loaded


@dataclass(frozen=True)
class Machine:
    """Measured speed of the compute device, in floating point operations per second."""

    float32: float
    float64: float


@dataclass(frozen=True)
class Workload:
    """What is to be computed.

    Attributes:
        targets: all targets.
        matrices: parameters of all matrices in the blocks.
        head: parameters of the output head.
        parameters: those of the whole model.
        width: numbers in a hidden state.
        batch_tokens: tokens that run through a block at a time.
        resident: whether the whole model is on the device at once.
        calibration_tokens: tokens of calibration (0 for a method that needs none).
        evaluation_tokens: tokens of one perplexity measurement (0 for none).
        gathers: whether the method gathers statistics at all.
        backward: whether it needs gradients.
        refined: tokens that factors are refined on after the cut (0 for no refining).
        pivots: whether they are stored as pivot layers, for which they are decomposed once more.
        solves: eigen-problems per weight.
        search: forward passes over the search text, times its tokens.
        held_out: tokens that refined blocks are judged on.
        corrected: tokens of all rounds of correction.
        rounds: rounds of correction.
        sums: numbers in the statistics of all layers.
        bases: numbers in one basis of every weight or stack of weights.
        blocks: decoder blocks of the model.
        samples: weight gradients held per weight (0 for a method that needs none).
    """

    targets: tuple[Target, ...]
    matrices: int
    head: int
    parameters: int
    width: int
    batch_tokens: int
    resident: bool
    calibration_tokens: int
    evaluation_tokens: int
    gathers: bool = True
    backward: bool = False
    refined: int = 0
    pivots: bool = False
    solves: int = 1
    samples: int = 0
    search: float = 0.0
    held_out: int = 0
    corrected: int = 0
    rounds: int = 0
    sums: int = 0
    bases: int = 0
    blocks: int = 0


def measure_machine(device: torch.device) -> Machine:
    """A fraction of a second of matrix products on the device."""
    rates: list[float] = []
    for dtype in (torch.float32, torch.float64):
        if device.type == "mps" and dtype == torch.float64:
            rates.append(rates[0] / 8)
            continue
        a = torch.ones(768, 768, dtype=dtype, device=device)
        _time(lambda a=a: a @ a)  # type: ignore[misc]
        rates.append(2 * 768**3 / min(_time(lambda a=a: a @ a) for _ in range(4)))  # type: ignore[misc]
    return Machine(*rates)


def stage_seconds(work: Workload, machine: Machine) -> dict[str, float]:
    """Predicted seconds of each stage, in order."""
    evaluate = 2 * work.evaluation_tokens * (work.matrices + work.head)
    forward, grams = _passes(work, work.calibration_tokens)
    calibrate = (forward + grams) if work.gathers else 0.0
    if work.backward:  # each block forwards twice and backwards once, the head thrice; grams on both sides
        calibrate = 3.2 * forward + 2.2 * grams + 6 * work.calibration_tokens * work.head
        calibrate += 12 * work.samples * sum(t.parameters * sum(t.shape) for t in work.targets)
    decompose = sum(_solve_flops(*t.shape) for t in work.targets)
    cutting = (2 if work.pivots else 1) * decompose / 4 / machine.float64
    if work.refined:
        forward, grams = _passes(work, work.refined)
        cutting += (5 * forward + 4 * grams) / machine.float32 + decompose / machine.float64
        judged = work.held_out * len({t.block for t in work.targets})
        cutting += 2 * judged * (work.matrices + work.head) / machine.float32
    stored = 4 * sum(t.parameters for t in work.targets)
    remembering = 2 * work.corrected * work.matrices / machine.float32
    correcting = (8 * work.corrected * work.matrices + 8 * work.corrected * work.head) / machine.float32
    correcting += work.rounds * sum(_step_flops(*t.shape) for t in work.targets) / machine.float64
    stages = {
        "measure the original": evaluate / machine.float32,
        "calibrate and decompose": calibrate / machine.float32 + work.solves * decompose / machine.float64,
        "allocate": 2 * work.search * (work.matrices + work.head) / machine.float32,
        "remember the original": remembering,
        "cut and refine factors" if work.refined else "cut factors": cutting,
        "correct": correcting,
        "measure the result": evaluate / machine.float32,
        "write": stored / 1e9,
    }
    left_out = () if work.rounds else ("remember the original", "correct")
    return {name: seconds for name, seconds in stages.items() if name not in left_out}


def peak_bytes(work: Workload, logits: int, itemsize: int, upcast: bool) -> int:
    """Predicted peak memory of the process, in bytes.

    Args:
        work: what is to be computed.
        logits: elements of the logits of one evaluation pass.
        itemsize: bytes per stored parameter.
        upcast: blocks are computed in float32.
    """
    blocks = {t.block for t in work.targets}
    compute = 4 if upcast else itemsize
    block = work.matrices // max(1, len(blocks)) * compute
    copies = (work.parameters * compute if work.resident else block) if compute != itemsize else 0
    wide = work.width * compute
    hidden, streams = work.calibration_tokens * wide, 3 * work.refined * wide
    first = [t for t in work.targets if t.block == min(blocks)]
    widest = max(max(t.shape) for t in work.targets)
    grams = sum(12 * n * n for n in group_widths(first)) if work.gathers else 0
    solving = 8 * 5 * widest * min(widest, max(min(t.shape) for t in work.targets))
    activations = (16 if work.backward else 6) * work.batch_tokens * widest * compute
    if work.backward:
        hidden, grams = 2 * hidden, 3 * grams + 4 * work.samples * sum(t.parameters for t in first)
        if work.resident:
            grams, activations = len(blocks) * grams, len(blocks) * activations
        activations = max(activations, 16 * logits)
    calibrating = copies + hidden + grams + solving + activations
    if work.refined:
        sums = 3 * sum(8 * n * n for n in group_widths(first))
        calibrating = max(calibrating, copies + streams + sums + solving)
    evaluating = 12 * logits if work.evaluation_tokens else 0
    return LIBRARIES + work.parameters * itemsize + max(calibrating, evaluating)


def run_bytes(work: Workload, stored: int, resumable: bool, keeps_statistics: bool = False) -> int:
    """About how many bytes the run directory will hold: bases of all targets, hidden states, gradients.

    Args:
        work: what is to be computed.
        stored: parameters of the targets once they are compressed.
        resumable: finished parts are kept, so that an interrupted run goes on.
        keeps_statistics: statistics are kept, in float64.
    """
    numbers = work.bases * (2 if work.backward else 1)
    numbers += 2 * work.sums if keeps_statistics else 0
    copies = 1 if resumable else 0
    if work.backward and not work.resident:
        copies += 2 + work.blocks
    tokens = copies * work.calibration_tokens
    if work.refined and resumable:
        numbers, tokens = numbers + stored, tokens + 2 * work.refined
    if work.rounds:
        numbers += 2 * stored
        tokens += (work.rounds + work.blocks) * (work.corrected // work.rounds)
    return 4 * (numbers + tokens * work.width)


def group_widths(targets: Iterable[Target]) -> list[int]:
    """Input widths of the groups that will share a Gram: siblings of equal width, except the last to run.

    A guess made without running the model; calibration itself goes by the identity of the tensors.
    """
    seen: dict[tuple[str, int], int] = {}
    for target in targets:
        n = target.shape[1]
        seen.setdefault((target.path.rpartition(".")[0], n), n)
    return list(seen.values())


def _passes(work: Workload, tokens: int) -> tuple[float, float]:
    """Operations of a forward pass over so many tokens, and of the grams of all layers' inputs."""
    return 2.0 * tokens * work.matrices, 2 * GRAM_SHARE * tokens * sum(n * n for n in group_widths(work.targets))


def _solve_flops(m: int, n: int) -> float:
    k, widest = min(m, n), max(m, n)
    return 40 * k**3 + 4 * k * k * widest + (2 * k * widest * widest if n > m else 0)


def _step_flops(m: int, n: int) -> float:
    k = min(m, n)
    return n**3 / 3 + 2 * m * n * n + 6 * k * m * n + 4 * k**3


def _time(work: Callable[[], torch.Tensor]) -> float:
    start = time.perf_counter()
    work().sum().item()
    return time.perf_counter() - start
