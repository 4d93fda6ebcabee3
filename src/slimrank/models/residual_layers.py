"""Find by trying which layers of a block add their output to the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

Place = Literal["entry", "exit"]
TOLERANCE = 8  # times the rounding error of the largest number


def residual_places(
    block: nn.Module, layers: Mapping[str, nn.Module], run: Callable[[], Tensor], entry: Tensor
) -> dict[str, Place]:
    """Find where layers add to the residual stream: to the input of the block, or to its output.

    "entry" is a layer whose output is added to the block's input before a norm reads the sum (o_proj). "exit" is one
    whose output is a term of the block's output (down_proj). Layers with a norm or a factor in between are neither.

    Args:
        block: a decoder block.
        layers: module path -> module, linear layers of it.
        run: runs it; its output.
        entry: what enters it (windows x tokens x width).
    """
    with answers_of(layers) as answers:
        output, read = _heard(block, run)
    found: dict[str, Place] = {}
    for path, answer in answers.items():
        if answer.numel() != output.numel():
            continue
        summed, wave = entry + answer.view_as(entry), _wave(entry)
        if _is_read(summed, read) and _is_read(summed + wave, _read_with(block, layers[path], wave, run)):
            found[path] = "entry"
        elif _near(_run_with(layers[path], _wave(output), run), output + _wave(output)):
            found[path] = "exit"
    return found


@contextmanager
def answers_of(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Yield the last output of each of these layers (module path -> module) during the context."""
    found: dict[str, Tensor] = {}

    def hook(path: str) -> Any:
        return lambda module, args, output: found.__setitem__(path, output)

    handles = [layer.register_forward_hook(hook(path)) for path, layer in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _heard(block: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the block's output and the inputs of the modules inside."""
    read: list[Tensor] = []

    def reads(module: nn.Module, args: tuple[Any, ...]) -> None:
        read.extend(x for x in args[:1] if isinstance(x, Tensor))

    handles = [module.register_forward_pre_hook(reads) for module in block.modules() if module is not block]
    try:
        return run(), read
    finally:
        for handle in handles:
            handle.remove()


def _is_read(expected: Tensor, read: list[Tensor]) -> bool:
    return any(_near(x.reshape_as(expected), expected) for x in read if x.numel() == expected.numel())


def _read_with(block: nn.Module, layer: nn.Module, more: Tensor, run: Callable[[], Tensor]) -> list[Tensor]:
    """Return the inputs of the modules inside when a layer's output changes by so much."""
    read: list[Tensor] = []

    def heard() -> Tensor:
        output, mine = _heard(block, run)
        read.extend(mine)
        return output

    _run_with(layer, more, heard)
    return read


def _run_with(layer: nn.Module, more: Tensor, run: Callable[[], Tensor]) -> Tensor:
    """Return the block's output when a layer's output changes by so much."""
    handle = layer.register_forward_hook(lambda module, args, output: output + more.view_as(output))
    try:
        return run()
    finally:
        handle.remove()


def _wave(output: Tensor) -> Tensor:
    """Make a change of the output's size, with both signs, that only an addition passes on unchanged."""
    wave = torch.linspace(-3, 5, output.numel(), dtype=torch.float32, device=output.device).sin()
    return (wave.view_as(output) * output.abs().max()).to(output)


def _near(found: Tensor, expected: Tensor) -> bool:
    limit = TOLERANCE * torch.finfo(found.dtype).eps * float(expected.abs().max())
    return bool((found - expected).abs().max() <= limit)
