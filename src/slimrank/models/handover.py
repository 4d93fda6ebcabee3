"""What blocks pass to later blocks besides hidden states; one pass of the model shows it.

Two ways are known. Blocks write to a mapping that later ones read (shared keys and values). Or a block returns tensors
beside its hidden states, and the next one is called with them (chosen tokens, states of routers). Both become named
tensors in a `HiddenState`: every stream of hidden states has its own, and gradients go back through them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from copy import copy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from slimrank.errors import ModelError
from slimrank.models.page_out import page_out
from slimrank.models.recording import Batch, Call, Container, Recorder, extras_of, first_of, opened
from slimrank.models.states import HiddenState, only_none, tensors_in, with_tensors

PROBE_TOKENS = 8
CLOSE = 1e-3  # of the largest output: a block that is run alone gives no more than rounding else
_KNOWN: WeakKeyDictionary[nn.ModuleList, Handover] = WeakKeyDictionary()  # to find it out reads the whole model
_HINT = "this layout is not supported yet; use --method svd, which needs no calibration"


@dataclass
class Handover:
    """How the blocks of a model depend on earlier ones.

    Attributes:
        blocks: their number.
        axis: the dimension of hidden states that counts windows, the next counting tokens; None if there is none.
        taken: block -> place among its arguments -> place in what the block before returns.
        values: number of a mapping and key -> what blocks write there, without its tensors.
    """

    blocks: int
    axis: int | None = None
    taken: dict[int, dict[str, str]] = field(default_factory=dict)
    values: dict[tuple[int, Any], Any] = field(default_factory=dict)
    learning: bool = False

    def run(self, index: int, forward: Callable[..., Any], call: Call, state: HiddenState) -> HiddenState:
        """Return the state after block `index`.

        Args:
            index: which block.
            forward: calls it.
            call: its recorded arguments; they do not change.
            state: what enters it, on the device of the block.
        """
        copies: dict[int, MutableMapping[Any, Any]] = {}
        other = {place: state.handed[f"output.{source}"] for place, source in self.taken.get(index, {}).items()}
        call = Call(with_tensors(call.args, "args", other), with_tensors(call.kwargs, "kwargs", other))
        args, kwargs = opened(call, lambda container: self._copy(container, state, copies))
        before = {number: dict(held) for number, held in copies.items()}
        output = forward(state.hidden, *args, **kwargs)
        return HiddenState(first_of(output), self._handed(index, output, state, before, copies))

    def _copy(
        self, container: Container, state: HiddenState, copies: dict[int, MutableMapping[Any, Any]]
    ) -> MutableMapping[Any, Any]:
        """Copy the mapping that a block takes, with what earlier blocks have written to it."""
        number = container.number
        if number not in copies:
            copies[number] = copy(container.held)
            for (holder, key), value in self.values.items():
                name = _name(holder, key)
                if holder == number and any(known.startswith(f"{name}.") or known == name for known in state.handed):
                    copies[number][key] = with_tensors(value, name, state.handed)
        return copies[number]

    def _handed(
        self,
        index: int,
        output: Any,
        state: HiddenState,
        before: Mapping[int, Mapping[Any, Any]],
        after: Mapping[int, Mapping[Any, Any]],
    ) -> dict[str, Tensor]:
        """Return what the state holds after the block besides hidden states."""
        if index == self.blocks - 1:
            return {}
        handed = {name: t for name, t in state.handed.items() if not name.startswith("output.")}
        for number, content in after.items():
            for key, value in content.items():
                if before[number].get(key) is not value:
                    self._know(index, number, key, value)
                    handed |= dict(tensors_in(value, _name(number, key)))
        wanted = {f"output.{source}" for source in self.taken.get(index + 1, {}).values()}
        found = dict(tensors_in(extras_of(output), "output"))
        return handed | {name: t for name, t in found.items() if self.learning or name in wanted}

    def _know(self, index: int, number: int, key: Any, value: Any) -> None:
        """Make sure that what a block writes to a mapping can be put back later.

        Raises:
            ModelError: it cannot.
        """
        if (number, key) in self.values:
            return
        name = _name(number, key)
        tensors: dict[str, Tensor | None] = dict.fromkeys(dict(tensors_in(value, name)))
        rest = with_tensors(value, name, tensors)
        if not self.learning or not only_none(rest):
            raise ModelError(
                f"block {index} passes '{key}' to later blocks; it holds more than tensors ({rest}).", _HINT
            )
        self.values[number, key] = rest


def _name(number: int, key: Any) -> str:
    return f"shared.{number}.{key}"


def handover_of(model: nn.Module, path: str, blocks: nn.ModuleList, ids: Tensor) -> Handover:
    """Find out how the blocks of a model depend on each other, from a few tokens, once.

    Raises:
        ModelError: the model does not run its blocks once each, in order, with nothing in between, or a block computes
            something else when it runs alone.
    """
    if blocks not in _KNOWN:
        _KNOWN[blocks] = _Lesson(model, path, blocks).learn(Batch(ids[:1, :PROBE_TOKENS]))
        page_out(model)  # all of it has been touched
    return _KNOWN[blocks]


class _Lesson:
    """Watches one pass of the model, and also runs every block alone."""

    def __init__(self, model: nn.Module, path: str, blocks: nn.ModuleList) -> None:
        self.model, self.path, self.blocks = model, path, blocks
        self.found = Handover(len(blocks), learning=True)
        self.seen: list[tuple[int, Tensor, Tensor]] = []
        self.wrong: list[str] = []
        self._handed: Mapping[str, Tensor] = {}
        self._extras: list[tuple[str, Tensor]] = []
        self._before: dict[str, tuple[int, int]] = {}

    def learn(self, batch: Batch) -> Handover:
        """Find out what blocks pass to each other. See `handover_of`."""
        if len({id(block) for block in self.blocks}) < len(self.blocks):
            raise self._refusal()
        self.calls, failure = self._recorded(batch)
        self._watch(batch)
        chained = all(torch.equal(out, into) for (_, _, out), (_, into, _) in pairwise(self.seen))
        if [index for index, _, _ in self.seen] != list(range(len(self.blocks))) or not chained:
            raise self._refusal()
        if failure is not None:
            raise failure
        if self.wrong:
            raise ModelError(self.wrong[0], _HINT)
        self.found.axis = _axis(self.seen[0][1], batch.input_ids)
        self.found.learning = False
        return self.found

    def _refusal(self) -> ModelError:
        return ModelError(
            f"{type(self.model).__name__} does not run the blocks of '{self.path}' once each, in order, with nothing "
            "in between.",
            _HINT,
        )

    def _recorded(self, batch: Batch) -> tuple[list[Call], ModelError | None]:
        """Record the arguments of the blocks; delay an error until the order of the blocks is known."""
        try:
            with torch.no_grad(), Recorder(self.blocks) as recorder:
                return recorder.record(self.model, batch, self._device())[1], None
        except ModelError as error:
            return [], error

    def _watch(self, batch: Batch) -> None:
        """Run the model unchanged and watch every block."""
        handles = []
        for index, block in enumerate(self.blocks):
            handles.append(block.register_forward_pre_hook(self._enters(index), with_kwargs=True))
            handles.append(block.register_forward_hook(self._leaves(index), with_kwargs=True))
        try:
            with torch.no_grad():
                self.model(input_ids=batch.input_ids.to(self._device()), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _enters(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._before = dict(_versions((*args, *kwargs.values())))
            rest = dict(kwargs) if args else {k: v for k, v in kwargs.items() if k != "hidden_states"}
            places = [*tensors_in(args[1:], "args"), *tensors_in(rest, "kwargs")]
            taken = {p: source for p, t in places for source, extra in self._extras if t is extra}
            if taken:
                self.found.taken[index] = taken

        return hook

    def _leaves(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            into = args[0] if args else kwargs.get("hidden_states")
            self.seen.append((index, into, first_of(output)))
            if dict(_versions((*args, *kwargs.values()))) != self._before:
                self.wrong.append(f"block '{self.path}.{index}' changes one of its arguments in place.")
            elif self.calls and len(self.seen) == index + 1:
                self._alone(index, module, HiddenState(into, self._handed), first_of(output))
            self._extras = [(name.removeprefix("output."), t) for name, t in tensors_in(extras_of(output), "output")]
            page_out(module)

        return hook

    def _alone(self, index: int, block: nn.Module, state: HiddenState, expected: Tensor) -> None:
        """Run a block with its recorded arguments, and compare."""
        found = self.found.run(index, block.forward, self.calls[index], state)
        self._handed = found.handed
        limit = CLOSE * float(expected.abs().max())
        if not math.isfinite(limit):
            return  # the run itself says where
        if found.hidden.shape != expected.shape or not float((found.hidden - expected).abs().max()) <= limit:
            self.wrong.append(f"block '{self.path}.{index}' computes something else when it is run alone.")


def _versions(tree: Any, name: str = "", depth: int = 3) -> Iterator[tuple[str, tuple[int, int]]]:
    """Return each tensor's memory and version count; looks into objects, but not into mappings, which are copied."""
    if isinstance(tree, Tensor):
        yield name, (id(tree), tree._version)
    elif isinstance(tree, (tuple, list)):
        for number, value in enumerate(tree):
            yield from _versions(value, f"{name}.{number}", depth)
    elif depth and not isinstance(tree, (nn.Module, type, Mapping)) and hasattr(tree, "__dict__"):
        for key, value in vars(tree).items():
            yield from _versions(value, f"{name}.{key}", depth - 1)


def _axis(hidden: Tensor, ids: Tensor) -> int | None:
    """Return the dimensions of hidden states that count windows and tokens."""
    found = [k for k in range(hidden.dim() - 2) if hidden.shape[k : k + 2] == ids.shape]
    return found[0] if len(found) == 1 else None
