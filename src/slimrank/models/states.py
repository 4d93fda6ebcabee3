"""What enters a block: hidden states, and anything else that earlier blocks pass to later ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class HiddenState:
    """What enters a block, for one batch. Gradients by it have the same form.

    Attributes:
        hidden: the hidden states.
        handed: tensors that earlier blocks pass to later ones (shared keys and values), by name; see `Handover`.
    """

    hidden: Tensor
    handed: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> HiddenState:
        """Return the same on a device, contiguous."""
        return HiddenState(self.hidden.to(device), {name: t.to(device).contiguous() for name, t in self.handed.items()})

    def leaves(self, device: torch.device) -> HiddenState:
        """Return the same on a device, as tensors to differentiate by."""
        handed = {name: t.to(device).detach() for name, t in self.handed.items()}
        for tensor in handed.values():
            tensor.requires_grad_(tensor.is_floating_point())
        return HiddenState(self.hidden.to(device).detach().requires_grad_(), handed)


def pulled_back(before: HiddenState, after: HiddenState, gradient: HiddenState) -> HiddenState:
    """Compute gradients by the state before a block from those by the state after it.

    Args:
        before: leaves.
        after: the output of the block for them.
        gradient: by `after`; missing tensors are zero.
    """
    ends = [(after.hidden, gradient.hidden)]
    ends += [(after.handed[name], g) for name, g in gradient.handed.items() if after.handed[name].requires_grad]
    starts = {name: t for name, t in before.handed.items() if t.requires_grad}
    outputs, weights = [end for end, _ in ends], [g.to(end) for end, g in ends]
    hidden, *handed = torch.autograd.grad(outputs, [before.hidden, *starts.values()], weights, allow_unused=True)
    found = dict(zip(starts, handed, strict=True))
    return HiddenState(hidden, {name: g for name, g in found.items() if g is not None})


def named(prefix: str, states: Sequence[HiddenState], numbers: Iterable[int] | None = None) -> dict[str, Tensor]:
    """Return states of each batch under the names that `states_named` reads; no two share memory.

    Args:
        prefix: of their names.
        states: one for each batch.
        numbers: of the batches; by default they are counted.
    """
    found = dict(zip(range(len(states)) if numbers is None else numbers, states, strict=True))
    whole = {f"{prefix}{b}": state.hidden for b, state in found.items()}
    return whole | {f"{prefix}{b}/{n}": t.clone() for b, state in found.items() for n, t in state.handed.items()}


def states_named(tensors: Mapping[str, Tensor], prefix: str, numbers: Iterable[int]) -> list[HiddenState]:
    """Return the stored states of the batches of these numbers."""
    return [HiddenState(tensors[f"{prefix}{b}"], _under(f"{prefix}{b}/", tensors)) for b in numbers]


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def tensors_in(tree: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors in nested tuples, lists and mappings, with names that give their place."""
    if isinstance(tree, Tensor):
        yield name, tree
    for key, value in _parts(tree):
        yield from tensors_in(value, f"{name}.{key}")


def with_tensors(tree: Any, name: str, tensors: Mapping[str, Tensor | None]) -> Any:
    """Return the same tree with other values at some of the names that `tensors_in` yields."""
    if name in tensors:
        return tensors[name]
    values = {key: with_tensors(value, f"{name}.{key}", tensors) for key, value in _parts(tree)}
    if isinstance(tree, Mapping):
        return type(tree)(values)  # type: ignore[call-arg]
    if isinstance(tree, (tuple, list)):
        return type(tree)(*values.values()) if hasattr(tree, "_fields") else type(tree)(values.values())
    return tree


def only_none(tree: Any) -> bool:
    """Tell whether nested tuples, lists and mappings hold nothing but None."""
    return all(only_none(value) for _, value in _parts(tree)) if _is_tree(tree) else tree is None


def _is_tree(tree: Any) -> bool:
    return isinstance(tree, (Mapping, tuple, list))


def _parts(tree: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(tree, Mapping):
        yield from tree.items()
    elif isinstance(tree, (tuple, list)):
        yield from enumerate(tree)
