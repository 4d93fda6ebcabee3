"""Final hidden states of a model, and its output head as a function of some positions of them.

The logits of a whole batch are then never there at once.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.models.blocks import BlockRunner
from slimrank.models.contexts import evaluating
from slimrank.models.gradients import Bypass
from slimrank.models.handover import PROBE_TOKENS
from slimrank.models.recording import Batch, first_of


class Head:
    """A model as two functions: token ids to the states after its last block, and these to logits.

    Args:
        model: a decoder from transformers.

    Raises:
        ModelError: it does not run its blocks as decoders do.
    """

    def __init__(self, model: Any) -> None:
        device = next(model.parameters()).device
        runner = BlockRunner(model, device, upcast=False, resident=True)
        with evaluating(model):
            runner.embed([Batch(torch.arange(PROBE_TOKENS, device=device)[None])])
        assert runner.answer is not None
        self.model, self.answer, self.path, self.blocks = model, runner.answer, runner.path, runner.blocks
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._last: dict[str, Any] = {"logits_to_keep": 1} if keeps else {}

    @property
    def trained(self) -> list[nn.Parameter]:
        """Return the parameters besides those of the blocks that are trained: the last norm, and others like it."""
        inside = {id(p) for p in self.blocks.parameters()}
        return [p for p in self.model.parameters() if p.requires_grad and id(p) not in inside]

    @property
    def vocabulary(self) -> int:
        """Return the number of logits of a position."""
        return int(self.model.config.get_text_config().vocab_size)

    def states(self, ids: Tensor, wanted: bool = False) -> list[Tensor]:
        """Return the states after the last block (batch x tokens x width); those after every block, if `wanted`."""
        found: dict[int, Tensor] = {}
        blocks = list(enumerate(self.blocks)) if wanted else [(len(self.blocks) - 1, self.blocks[-1])]

        def keep(index: int) -> Any:
            return lambda module, args, output: found.__setitem__(index, first_of(output))

        handles = [block.register_forward_hook(keep(index)) for index, block in blocks]
        try:
            self.model(input_ids=ids, use_cache=False, **self._last)
        finally:
            for handle in handles:
                handle.remove()
        return [found[index] for index, _ in blocks]

    def logits(self, final: Tensor) -> Tensor:
        """Return the logits (positions x vocabulary) of final states (positions x width)."""
        ids = torch.zeros(1, len(final), dtype=torch.long, device=final.device)
        with Bypass(self.blocks, self.answer) as bypass:
            bypass.final = final[None]
            return self.model(input_ids=ids, use_cache=False).logits[0]
