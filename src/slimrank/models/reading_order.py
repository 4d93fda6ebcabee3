"""The order in which the layers of a block read their inputs, and running a block only as far as some of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from slimrank.models.structure import without_numbers


class _AllRead(Exception):  # noqa: N818 (control flow, never seen by users)
    """Ends a forward pass: nothing after these layers is needed."""


def reading_order(layers: Mapping[str, nn.Module], run: Callable[[], object]) -> list[list[str]]:
    """Sort layers into stages, so that a layer follows all those whose outputs its own input depends on.

    Layers that read the same tensor are in one stage; so are layers whose paths differ by a number only (experts).
    Those that `run` does not reach come last.

    Args:
        layers: module path -> module.
        run: calls them.
    """
    stages: list[tuple[Tensor, list[str]]] = []

    def observe(path: str, x: Tensor) -> None:
        role = without_numbers(path)
        if any(role in roles for _, roles in stages):
            return
        for known, roles in stages:
            if known is x:
                roles.append(role)
                return
        stages.append((x, [role]))

    _run_heard(layers, run, observe)
    members = [[path for path in layers if without_numbers(path) in roles] for _, roles in stages]
    missing = [path for path in layers if not any(path in stage for stage in members)]
    return [*members, missing] if missing else members


def run_until_read(layers: Iterable[nn.Module], run: Callable[[], object]) -> None:
    """Run only until each of these layers was called as often as it is listed; their own hooks see those calls."""
    waiting = Counter(layers)

    def observe(module: nn.Module, args: Any) -> None:
        waiting[module] -= 1
        if all(left <= 0 for left in waiting.values()):
            raise _AllRead

    handles = [layer.register_forward_pre_hook(observe) for layer in waiting]
    try:
        with suppress(_AllRead):
            run()
    finally:
        for handle in handles:
            handle.remove()


def calls_of(layers: Mapping[str, nn.Module], run: Callable[[], object]) -> Counter[str]:
    """Count how often `run` calls each of these layers (module path -> module); at least once."""
    found: Counter[str] = Counter()
    _run_heard(layers, run, lambda path, x: found.update([path]))
    return Counter({path: max(1, found[path]) for path in layers})


def _run_heard(layers: Mapping[str, nn.Module], run: Callable[[], object], hear: Callable[[str, Tensor], None]) -> None:
    """Run, and tell `hear` the path and the input of each of these layers before every call."""

    def hook(path: str) -> Any:
        return lambda module, args: hear(path, args[0])

    handles = [layer.register_forward_pre_hook(hook(path)) for path, layer in layers.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
