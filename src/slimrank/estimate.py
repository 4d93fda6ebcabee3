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
        calibration_tokens: tokens of calibration (0 for a method that needs none).
        evaluation_tokens: tokens of one perplexity measurement (0 for none).
    """

    targets: tuple[Target, ...]
    matrices: int
    head: int
    calibration_tokens: int
    evaluation_tokens: int


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


def stage_seconds(work: Workload, machine: Machine, backward: bool = False, refines: bool = False) -> dict[str, float]:
    """Predicted seconds of each stage, in order.

    Args:
        work: what is to be computed.
        machine: how fast.
        backward: calibration goes backwards, too: each block forwards twice and backwards once, the head thrice.
        refines: factors are refined after the cut.
    """
    evaluate = 2 * work.evaluation_tokens * (work.matrices + work.head) / machine.float32
    calibrate = 2.0 * work.calibration_tokens * work.matrices
    if work.calibration_tokens:
        calibrate += 2 * GRAM_SHARE * work.calibration_tokens * sum(n * n for n in group_widths(work.targets))
    if backward:
        calibrate = 2.2 * calibrate + work.calibration_tokens * (2.5 * work.matrices + 6 * work.head)
    decompose = sum(_solve_flops(*t.shape) for t in work.targets)
    stored = 4 * sum(t.parameters for t in work.targets)
    cutting = 2 * decompose / 8 / machine.float64
    if refines:
        cutting += 3 * calibrate / machine.float32 + decompose / machine.float64
    return {
        "measure the original": evaluate,
        "calibrate and decompose": calibrate / machine.float32 + decompose / machine.float64,
        "cut and refine factors" if refines else "cut factors": cutting,
        "measure the result": evaluate,
        "write": stored / 1e9,
    }


def peak_bytes(
    work: Workload,
    total: int,
    width: int,
    logits: int,
    itemsize: int,
    batch_tokens: int,
    resident: bool,
    upcast: bool,
    backward: bool = False,
) -> int:
    """Predicted peak memory of the process, in bytes.

    Args:
        work: what is to be computed.
        total: parameters of the whole model.
        width: hidden size.
        logits: elements of the logits of one evaluation pass.
        itemsize: bytes per stored parameter.
        batch_tokens: tokens that run through a block at a time.
        resident: the whole model is on the device at once.
        upcast: blocks are computed in float32.
        backward: calibration goes backwards, too.
    """
    blocks = {t.block for t in work.targets}
    compute = 4 if upcast else itemsize
    block = work.matrices // max(1, len(blocks)) * compute
    copies = (total * compute if resident else block) if compute != itemsize else 0
    hidden = work.calibration_tokens * width * compute
    first = [t for t in work.targets if t.block == min(blocks)]
    widest = max(max(t.shape) for t in work.targets)
    grams = sum(12 * n * n for n in group_widths(first)) if work.calibration_tokens else 0
    solving = 8 * 5 * widest * min(widest, max(min(t.shape) for t in work.targets))
    activations = (16 if backward else 6) * batch_tokens * widest * compute
    if backward:
        hidden, grams = 2 * hidden, 3 * grams
        activations = max(len(blocks) * activations if resident else activations, 16 * logits)
    calibrating = copies + hidden + grams + solving + activations
    evaluating = 12 * logits if work.evaluation_tokens else 0
    return LIBRARIES + total * itemsize + max(calibrating, evaluating)


def group_widths(targets: Iterable[Target]) -> list[int]:
    """Input widths of the groups that will share a Gram: siblings of equal width, except the last to run.

    A guess made without running the model; calibration itself goes by the identity of the tensors.
    """
    seen: dict[tuple[str, int], int] = {}
    for target in targets:
        n = target.shape[1]
        seen.setdefault((target.path.rpartition(".")[0], n), n)
    return list(seen.values())


def _solve_flops(m: int, n: int) -> float:
    k, widest = min(m, n), max(m, n)
    return 40 * k**3 + 4 * k * k * widest + (2 * k * widest * widest if n > m else 0)


def _time(work: Callable[[], torch.Tensor]) -> float:
    start = time.perf_counter()
    work().sum().item()
    return time.perf_counter() - start
