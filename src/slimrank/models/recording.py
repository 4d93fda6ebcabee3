"""Record what a model passes to each of its blocks, without running them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.errors import ModelError


@dataclass(frozen=True)
class Batch:
    """Token ids (batch x tokens) and, where there is padding, their mask (1 = a real token)."""

    input_ids: Tensor
    attention_mask: Tensor | None = None


@dataclass(frozen=True)
class Container:
    """A mapping that blocks may write to. Every run of a block gets a copy of its own.

    Attributes:
        number: equal for all blocks that take the same object.
        held: the mapping as it was before any block wrote to it.
    """

    number: int
    held: MutableMapping[Any, Any]


@dataclass(frozen=True)
class Call:
    """The arguments of a block besides its hidden states; mappings are `Container`s."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Answer = Callable[[Tensor], Any]  # hidden states -> what a block of the model gives back


class _LastBlockReached(Exception):  # noqa: N818 (control flow, never seen by users)
    """Ends the recorded forward pass: nothing after the blocks is needed."""


class Patched(ABC):
    """Another forward in every block inside its context; a subclass makes it in `stand_in`."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.blocks = blocks

    def __enter__(self) -> Any:
        self.own_forward = [vars(block).get("forward") for block in self.blocks]
        self.probe = self.blocks[0].forward
        for index, block in enumerate(self.blocks):
            block.forward = self.stand_in(index)
        return self

    def __exit__(self, *_: object) -> None:
        for block, own in zip(self.blocks, self.own_forward, strict=True):
            del block.forward
            if own is not None:
                block.forward = own

    @abstractmethod
    def stand_in(self, index: int) -> Callable[..., Any]:
        """Replace the forward of block `index`."""


class Recorder(Patched):
    """Notes the arguments of every block, and passes the hidden states on."""

    calls: list[Call | None]
    hidden: Tensor | None = None
    answer: Answer | None = None

    def record(self, model: nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, list[Call]]:
        """Record the hidden states that enter the first block, and the arguments of each block."""
        self.calls, self.hidden = [None] * len(self.blocks), None
        self._containers: list[tuple[Any, Container]] = []
        mask = batch.attention_mask
        with suppress(_LastBlockReached):
            model(
                input_ids=batch.input_ids.to(device),
                attention_mask=None if mask is None else mask.to(device),
                use_cache=False,
            )
        missing = [i for i, call in enumerate(self.calls) if call is None]
        if missing or self.hidden is None:
            raise ModelError(
                f"the forward pass of {type(model).__name__} never reached blocks {missing[:5]}.",
                "this layout is not supported yet; please report the model",
            )
        return self.hidden, [call for call in self.calls if call is not None]

    def stand_in(self, index: int) -> Callable[..., Any]:
        """See `Patched`."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states", None)
            if not isinstance(hidden, Tensor):
                raise ModelError(f"block {index} is called without hidden states.", "please report the model")
            call = Call(self._marked(args[1:]), {name: self._marked(value) for name, value in kwargs.items()})
            self.calls[index] = call
            if index == 0:
                self.hidden = hidden
                self.answer = self.answer or _answer_like(self._first(hidden, call))
            if index == len(self.blocks) - 1:
                raise _LastBlockReached
            assert self.answer is not None
            return self.answer(hidden)

        return forward

    def _first(self, hidden: Tensor, call: Call) -> Any:
        """Run the first block; it writes to copies of what the model gives to all blocks."""
        args, kwargs = opened(call, lambda container: copy(container.held))
        return self.probe(hidden, *args, **kwargs)

    def _marked(self, value: Any) -> Any:
        """Return the value with a `Container` instead of every mapping in it."""
        if not isinstance(value, MutableMapping):
            return mapped(value, self._marked)
        known = next((container for held, container in self._containers if held is value), None)
        if known is None:
            known = Container(len(self._containers), copy(value))
            self._containers.append((value, known))
        return known


def opened(call: Call, mapping: Callable[[Container], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call, with a mapping instead of every container."""

    def open_(value: Any) -> Any:
        return mapping(value) if isinstance(value, Container) else mapped(value, open_)

    return open_(call.args), {name: open_(value) for name, value in call.kwargs.items()}


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a tuple or list with every item changed; any other value unchanged."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(change, value))
    return type(value)(map(change, value)) if isinstance(value, (tuple, list)) else value


def first_of(output: Any) -> Tensor:
    """Return the hidden states in the output of a block."""
    return output[0] if isinstance(output, (tuple, list)) else output


def extras_of(output: Any) -> tuple[Any, ...]:
    """Return the output of a block without its hidden states."""
    return tuple(output[1:]) if isinstance(output, (tuple, list)) else ()


def _answer_like(output: Any) -> Answer:
    """Learn from one output how the blocks of a model return hidden states."""
    if not isinstance(output, (tuple, list)):
        return lambda hidden: hidden
    extra = extras_of(output)
    return lambda hidden: (hidden, *extra)


def share(calls: list[Call], previous: Sequence[Call] | None) -> list[Call]:
    """Return the same calls, with equal tensors replaced by one stored tensor."""
    pool = [t for call in previous or () for t in _tensors((call.args, *call.kwargs.values()))]

    def pooled(value: Any) -> Any:
        if isinstance(value, Container):
            for key, item in value.held.items():
                value.held[key] = pooled(item)
        return _pooled(value, pool) if isinstance(value, Tensor) else mapped(value, pooled)

    return [Call(pooled(call.args), {name: pooled(value) for name, value in call.kwargs.items()}) for call in calls]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Container):
        yield from _tensors(tuple(value.held.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _pooled(value: Tensor, pool: list[Tensor]) -> Tensor:
    for known in pool:
        if known is value or (known.shape == value.shape and known.dtype == value.dtype and torch.equal(known, value)):
            return known
    pool.append(value)
    return value
