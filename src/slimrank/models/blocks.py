"""Run a decoder block by block, with no forward code of any particular model.

The model's own forward runs once per batch with every block replaced by a recorder that notes the arguments
of the call (attention mask, position embeddings, caches off ...) and passes its hidden states on. After
that each block can run alone with these arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.errors import ModelError, NonFiniteError
from slimrank.models.contexts import evaluating
from slimrank.models.handover import Handover, handover_of
from slimrank.models.placement import placed
from slimrank.models.precision import Autocast
from slimrank.models.recording import Answer, Batch, Call, Recorder, share
from slimrank.models.states import HiddenState
from slimrank.models.structure import experts_by_kind, find_blocks


class BlockRunner:
    """The decoder blocks of a model as a sequence of callables over a set of batches.

    Args:
        model: a decoder from transformers.
        device: where blocks are computed.
        upcast: compute in float32 what is stored in 16 bits.
        resident: keep the whole model on the device (inside `self.session()`), instead of one block at a time.
            The results are the same.
        bfloat16: compute the products of blocks in bfloat16 (inside `self.session()`).

    `states[b]` is what enters the next block, for batch b: hidden states, and what else earlier blocks pass on.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, upcast: bool, resident: bool, bfloat16: bool = False
    ) -> None:
        self.model, self.device, self.upcast, self.resident = model, device, upcast, resident
        self.bfloat16 = bfloat16
        self.path, self.blocks = find_blocks(model)
        self.batches: list[Batch] = []
        self.states: list[HiddenState] = []
        self.answer: Answer | None = None
        self._calls: list[list[Call]] = []
        self._handover = Handover(len(self.blocks))

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def hidden(self) -> list[Tensor]:
        """Return the hidden states that enter the next block, of each batch."""
        return [state.hidden for state in self.states]

    def experts(self, index: int, paths: Iterable[str]) -> list[list[str]]:
        """Return the layers of a block that are experts, by their kind: see `experts_by_kind`."""
        return experts_by_kind(self.blocks[index], f"{self.path}.{index}.", paths)

    @contextmanager
    def session(self) -> Iterator[BlockRunner]:
        """Set evaluation mode without gradients; when resident, place the whole model on the device."""
        products = Autocast(self.blocks) if self.bfloat16 else nullcontext()
        with evaluating(self.model), placed([self.model] if self.resident else [], self.device, self.upcast), products:
            yield self

    def embed(self, batches: Iterable[Batch]) -> None:
        """Embed the batches, and record what the model passes to each of its blocks.

        Raises:
            ModelError: a block that is never called, or called without hidden states.
        """
        self.batches, self.states, self._calls = list(batches), [], []
        if self.batches:
            self._handover = handover_of(self.model, self.path, self.blocks, self.batches[0].input_ids)
        outside = parts_outside(self.model, self.blocks)
        with self.placed(*outside, self.blocks[0]), Recorder(self.blocks) as recorder:
            for batch in self.batches:
                hidden, calls = recorder.record(self.model, batch, self.device)
                self.states.append(self.to_host(HiddenState(hidden)))
                self._calls.append(share(calls, self._calls[-1] if self._calls else None))
            self.answer = recorder.answer

    def step(self, index: int, before: Callable[[Batch], None] | None = None) -> None:
        """Run block `index` over all batches; its outputs become the states.

        Args:
            index: of the block.
            before: called with each batch before the block runs on it.

        Raises:
            NonFiniteError: NaN or infinity in the block's output.
        """
        with self.placed_block(index):
            for b, batch in enumerate(self.batches):
                if before is not None:
                    before(batch)
                self.states[b] = self.to_host(self.run(index, b, self.states[b]))

    def run(self, index: int, b: int, state: HiddenState) -> HiddenState:
        """Return the state after block `index`, which is placed already, for batch b and the state that enters it.

        Raises:
            NonFiniteError: NaN or infinity in it.
        """
        after = self._handover.run(index, self.blocks[index], self._calls[b][index], state.to(self.device))
        if not bool(torch.isfinite(after.hidden).all()):
            raise NonFiniteError(
                f"NaN or infinity in the output of block '{self.path}.{index}' (batch {b}).",
                "run in float32 (--dtype float32); check that the model itself is sound",
            )
        return after

    def through(self, states: Sequence[HiddenState], first: int, last: int) -> list[HiddenState]:
        """Return states of all batches after blocks first .. last - 1; the input states do not change.

        Raises:
            NonFiniteError: NaN or infinity in a block's output.
        """
        found = list(states)
        for index in range(first, last):
            with self.placed_block(index):
                found = [self.to_host(self.run(index, b, state)) for b, state in enumerate(found)]
        return found

    def finals(self, states: Sequence[HiddenState], first: int) -> list[Tensor]:
        """Return the output of the last block, of each batch, from the states that enter block `first`."""
        return [state.hidden for state in self.through(states, first, len(self))]

    def to_host(self, state: HiddenState) -> HiddenState:
        """Move a state to where states are stored between blocks."""
        return state if self.resident else state.to(torch.device("cpu"))

    def windows(self, hidden: Tensor, rows: slice, first: int = 0) -> Tensor:
        """Return some windows of hidden states, from position `first` on.

        Raises:
            ModelError: the dimensions of windows and tokens are unknown, and not all windows are wanted.
        """
        axis = self._handover.axis
        if axis is None:
            if first == 0 and rows == slice(None):
                return hidden
            raise self._no_axis()
        return hidden[(*[slice(None)] * axis, rows, slice(first, None))]

    def check(self, ids: Tensor, apart: bool) -> None:
        """Make sure, on a few tokens, that the blocks can be run one by one.

        Args:
            ids: some windows.
            apart: whether windows and tokens of hidden states must be known, as for divergences.

        Raises:
            ModelError: they cannot.
        """
        with self.session():
            self._handover = handover_of(self.model, self.path, self.blocks, ids)
        if apart and self._handover.axis is None:
            raise self._no_axis()

    def _no_axis(self) -> ModelError:
        return ModelError(
            f"hidden states of {type(self.model).__name__} do not have separate dimensions for windows and tokens.",
            "use options that need no divergence: --allocation uniform, --refine none, --corrections 0",
        )

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Join hidden states of some windows each into those of all windows."""
        return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=self._handover.axis or 0)

    @contextmanager
    def placed_block(self, index: int) -> Iterator[nn.Module]:
        """Yield block `index` with its weights on the compute device."""
        with self.placed(self.blocks[index]):
            yield self.blocks[index]

    def placed(self, *parts: nn.Module | Tensor) -> Any:
        """Place these weights, or those of these modules, on the compute device inside the context."""
        return placed(() if self.resident else parts, self.device, self.upcast)


def parts_outside(model: nn.Module, blocks: nn.ModuleList) -> list[nn.Module | Tensor]:
    """Return the smallest modules and weights that cover the model except its blocks and its output head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    holders = {id(m) for m in model.modules() if any(child is blocks for child in m.modules())}
    outside: list[nn.Module | Tensor] = []
    for module in model.modules():
        if id(module) in holders and module is not blocks:
            outside += [c for c in module.children() if id(c) not in holders and c is not head]
            outside += [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return outside
