"""Run a decoder block by block, with no forward code of any particular model.

The model's own forward runs once per batch with every block replaced by a recorder that notes the arguments
it was called with (attention mask, position embeddings, caches off ...) and hands its hidden states on. After
that each block can be called alone with just those arguments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from slimrank.errors import ModelError, NonFiniteError
from slimrank.models.mode import evaluating
from slimrank.models.paging import page_out
from slimrank.models.placement import placed
from slimrank.models.structure import experts_by_kind, find_blocks

PROBE_TOKENS = 8
_SEQUENTIAL: WeakSet[nn.ModuleList] = WeakSet()  # found to be so: to find it out reads the whole model


@dataclass(frozen=True)
class Batch:
    """Token ids (batch x tokens) and, where there is padding, their mask (1 = a real token)."""

    input_ids: Tensor
    attention_mask: Tensor | None = None


@dataclass(frozen=True)
class _Call:
    """What a block is called with besides its hidden states, and whether it answers with a tuple."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Answer = Callable[[Tensor], Any]  # hidden states -> what a block of the model gives back


class _LastBlockReached(Exception):  # noqa: N818 (control flow, never seen by users)
    """Ends the recorded forward pass: nothing after the blocks is needed."""


class BlockRunner:
    """The decoder blocks of a model as a sequence of callables over a set of batches.

    Args:
        model: a decoder from transformers.
        device: where blocks are computed.
        upcast: compute in float32 what is stored in 16 bits.
        resident: keep the whole model on the device (inside `self.session()`), instead of one block at a time.
            The results are the same.

    `hidden[b]` are the hidden states (batch x tokens x width) that enter the next block, for batch b.
    """

    def __init__(self, model: nn.Module, device: torch.device, upcast: bool, resident: bool) -> None:
        self.model, self.device, self.upcast, self.resident = model, device, upcast, resident
        self.path, self.blocks = find_blocks(model)
        self.batches: list[Batch] = []
        self.hidden: list[Tensor] = []
        self.answer: Answer | None = None
        self._calls: list[list[_Call]] = []

    def __len__(self) -> int:
        return len(self.blocks)

    def experts(self, index: int, paths: Iterable[str]) -> list[list[str]]:
        """Those of a block's layers that are experts, by their kind: see `experts_by_kind`."""
        return experts_by_kind(self.blocks[index], f"{self.path}.{index}.", paths)

    @contextmanager
    def session(self) -> Iterator[BlockRunner]:
        """Evaluation mode, no gradients and, when resident, the whole model on the device."""
        with evaluating(self.model), placed([self.model] if self.resident else [], self.device, self.upcast):
            yield self

    def embed(self, batches: Iterable[Batch]) -> None:
        """Embed the batches, and record what the model passes to each of its blocks.

        Raises:
            ModelError: a block that is never called, or called without hidden states.
        """
        self.batches, self.hidden, self._calls = list(batches), [], []
        if self.batches and self.blocks not in _SEQUENTIAL:
            check_sequential(self.model, self.path, self.blocks, self.batches[0].input_ids[:1, :PROBE_TOKENS])
            page_out(self.model)  # the probe has touched all of it
            _SEQUENTIAL.add(self.blocks)
        outside = parts_outside(self.model, self.blocks)
        with self.placed(*outside, self.blocks[0]), _Recorder(self.blocks) as recorder:
            for batch in self.batches:
                hidden, calls = recorder.record(self.model, batch, self.device)
                self.hidden.append(self.kept(hidden))
                self._calls.append(_share(calls, self._calls[-1] if self._calls else None))
            self.answer = recorder.answer

    def step(self, index: int, before: Callable[[Batch], None] | None = None) -> None:
        """Run block `index` over all batches; its outputs become the hidden states.

        Args:
            index: which block.
            before: called with each batch before the block runs on it.

        Raises:
            NonFiniteError: NaN or infinity in the block's output.
        """
        with self.placed_block(index):
            for b, batch in enumerate(self.batches):
                if before is not None:
                    before(batch)
                self.hidden[b] = self.kept(self.run(index, b, self.hidden[b]))

    def run(self, index: int, b: int, hidden: Tensor) -> Tensor:
        """Output of block `index`, which is placed already, for batch b and the hidden states that enter it.

        Raises:
            NonFiniteError: NaN or infinity in it.
        """
        call = self._calls[b][index]
        output = first_of(self.blocks[index](hidden.to(self.device), *call.args, **call.kwargs))
        if not bool(torch.isfinite(output).all()):
            raise NonFiniteError(
                f"NaN or infinity in the output of block '{self.path}.{index}' (batch {b}).",
                "run in float32 (--dtype float32); check that the model itself is sound",
            )
        return output

    def through(self, hidden: Sequence[Tensor], first: int, last: int) -> list[Tensor]:
        """Hidden states of all batches after blocks first .. last - 1; those that are passed in stay as they are.

        Raises:
            NonFiniteError: NaN or infinity in a block's output.
        """
        found = list(hidden)
        for index in range(first, last):
            with self.placed_block(index):
                found = [self.kept(self.run(index, b, h)) for b, h in enumerate(found)]
        return found

    def kept(self, hidden: Tensor) -> Tensor:
        """Hidden states where they are kept between blocks."""
        return hidden if self.resident else hidden.cpu()

    @contextmanager
    def placed_block(self, index: int) -> Iterator[nn.Module]:
        """Block `index`, its weights on the compute device."""
        with self.placed(self.blocks[index]):
            yield self.blocks[index]

    def placed(self, *parts: nn.Module | Tensor) -> Any:
        """Context in which these weights, or those of these modules, are on the compute device."""
        return placed(() if self.resident else parts, self.device, self.upcast)


def check_sequential(model: nn.Module, path: str, blocks: nn.ModuleList, ids: Tensor) -> None:
    """Make sure, on a few tokens, that the model runs its blocks once each, in order, and does nothing in between.

    Raises:
        ModelError: it does something else, so that blocks cannot be run one by one.
    """
    seen: list[tuple[int, Tensor, Tensor]] = []

    def observe(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen.append((index, args[0] if args else kwargs.get("hidden_states"), first_of(output)))
            page_out(module)

        return hook

    handles = [b.register_forward_hook(observe(i), with_kwargs=True) for i, b in enumerate(blocks)]
    try:
        with torch.no_grad():
            model(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    order = [index for index, _, _ in seen]
    chained = all(torch.equal(out, into) for (_, _, out), (_, into, _) in pairwise(seen))
    if order != list(range(len(blocks))) or not chained:
        raise ModelError(
            f"{type(model).__name__} does not run the blocks of '{path}' once each, in order, with nothing in between.",
            "this layout is not supported yet; --method svd needs no calibration and works",
        )


class Patched(ABC):
    """Another forward in every block, for the time of its context; a subclass says which in `stand_in`."""

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
        """What block `index` does instead of its own forward."""


class _Recorder(Patched):
    """Notes what every block is called with, and hands the hidden states on."""

    calls: list[_Call | None]
    hidden: Tensor | None = None
    answer: Answer | None = None

    def record(self, model: nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, list[_Call]]:
        """The hidden states that enter the first block, and what each block was called with."""
        self.calls, self.hidden = [None] * len(self.blocks), None
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
        def forward(*args: Any, **kwargs: Any) -> Any:
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states", None)
            if not isinstance(hidden, Tensor):
                raise ModelError(f"block {index} is called without hidden states.", "please report the model")
            self.calls[index] = _Call(args[1:], kwargs)
            if index == 0:
                self.hidden = hidden
                self.answer = self.answer or _answer_like(self.probe(hidden, *args[1:], **kwargs))
            if index == len(self.blocks) - 1:
                raise _LastBlockReached
            assert self.answer is not None
            return self.answer(hidden)

        return forward


def _answer_like(output: Any) -> Answer:
    """How the blocks of a model give back hidden states, learnt from one of their outputs."""
    if not isinstance(output, (tuple, list)):
        return lambda hidden: hidden
    extra = tuple(output[1:])
    return lambda hidden: (hidden, *extra)


def parts_outside(model: nn.Module, blocks: nn.ModuleList) -> list[nn.Module | Tensor]:
    """The smallest modules, and weights of the modules around the blocks, that are all but blocks and output head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    holders = {id(m) for m in model.modules() if any(child is blocks for child in m.modules())}
    outside: list[nn.Module | Tensor] = []
    for module in model.modules():
        if id(module) in holders and module is not blocks:
            outside += [c for c in module.children() if id(c) not in holders and c is not head]
            outside += [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return outside


def first_of(output: Any) -> Tensor:
    """The hidden states in what a block gives back."""
    return output[0] if isinstance(output, (tuple, list)) else output


def _share(calls: list[_Call], previous: Sequence[_Call] | None) -> list[_Call]:
    """The same calls, with tensors replaced by equal ones already held, so that they are stored once."""
    pool: list[Tensor] = []
    if previous is not None:
        pool += [t for call in previous for t in _tensors(call)]
    shared: list[_Call] = []
    for call in calls:
        args = tuple(_pooled(v, pool) for v in call.args)
        shared.append(_Call(args, {k: _pooled(v, pool) for k, v in call.kwargs.items()}))
    return shared


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, _Call):
        yield from _tensors((*value.args, *value.kwargs.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _pooled(value: Any, pool: list[Tensor]) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_pooled(v, pool) for v in value)
    if not isinstance(value, Tensor):
        return value
    for known in pool:
        if known is value or (known.shape == value.shape and known.dtype == value.dtype and torch.equal(known, value)):
            return known
    pool.append(value)
    return value
