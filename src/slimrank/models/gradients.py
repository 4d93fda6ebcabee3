"""Gradients of the loss by hidden states: of the last block, and from there backwards block by block.

Weights are frozen throughout, so that no gradient of a weight is ever allocated; statistics are taken by hooks while
each block's forward is computed again and differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from slimrank.errors import ModelError, NonFiniteError
from slimrank.models.blocks import BlockRunner, parts_outside
from slimrank.models.contexts import evaluating
from slimrank.models.handover import PROBE_TOKENS
from slimrank.models.recording import Answer, Batch, Patched
from slimrank.models.states import HiddenState, pulled_back

LOGITS_AT_ONCE = 2**25  # elements


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze all parameters inside the context."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)


def next_token_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Sum over all real tokens but the first of -log p(token | those before it): labels are shifted once, here."""
    labels = batch.input_ids[:, 1:].to(logits.device)
    losses = cross_entropy(logits[:, :-1].float().flatten(0, 1), labels.flatten(), reduction="none")
    if batch.attention_mask is None:
        return losses.sum()
    mask = batch.attention_mask.to(losses)
    return (losses * (mask[:, 1:] * mask[:, :-1]).flatten()).sum()


class Bypass(Patched):
    """Skips all blocks; the last one returns the hidden states that are set here."""

    final: Tensor

    def __init__(self, blocks: nn.ModuleList, answer: Answer) -> None:
        super().__init__(blocks)
        self.answer = answer

    def stand_in(self, index: int) -> Callable[..., Any]:
        """See `Patched`."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            last = index == len(self.blocks) - 1
            return self.answer(self.final if last else (args[0] if args else kwargs["hidden_states"]))

        return forward


def loss_gradients(runner: BlockRunner, final: list[Tensor]) -> list[HiddenState]:
    """Return gradients of the next-token loss by the state after the last block, one for each batch.

    Args:
        runner: has embedded its batches.
        final: output of the last block, one for each batch.

    Raises:
        NonFiniteError: the loss of a batch is NaN or infinite.
        ModelError: the model gives no logits, or they do not depend on its blocks.
    """
    gradients: list[HiddenState] = []
    with through_head(runner) as bypass, frozen(runner.model):
        for b, batch in enumerate(runner.batches):
            parts = []
            for rows in rows_of(batch, runner.model):
                bypass.final = runner.windows(final[b], rows).to(runner.device).detach().requires_grad_()
                part = part_of(batch, rows)
                with torch.enable_grad():
                    loss = next_token_loss(logits_of(runner.model, part, runner.device), part)
                parts.append(gradient_of(loss, bypass.final, runner.model, b))
            gradients.append(runner.to_host(HiddenState(runner.joined(parts))))
    return gradients


@contextmanager
def through_head(runner: BlockRunner) -> Iterator[Bypass]:
    """Yield a model whose output is the logits of given final hidden states: only its head computes."""
    assert runner.answer is not None
    head = runner.model.get_output_embeddings()  # type: ignore[operator]
    outside = [*parts_outside(runner.model, runner.blocks), *([head] if head is not None else [])]
    with runner.placed(*outside), Bypass(runner.blocks, runner.answer) as bypass:
        yield bypass


def gradient_of(loss: Tensor, final: Tensor, model: nn.Module, b: int) -> Tensor:
    """Return the gradient of a loss of batch b by final hidden states.

    Raises:
        NonFiniteError, ModelError: see `check_loss`.
    """
    check_loss(loss, model, b)
    return torch.autograd.grad(loss, final)[0]


def check_loss(loss: Tensor, model: nn.Module, b: int) -> None:
    """Make sure that a loss is finite and can be differentiated.

    Raises:
        NonFiniteError: it is NaN or infinite.
        ModelError: it does not depend on what the model's blocks compute.
    """
    if not loss.requires_grad:
        raise ModelError(
            f"no gradients pass through the logits of {type(model).__name__}.",
            "use a method that needs no gradients: see 'slimrank methods'",
        )
    if not bool(torch.isfinite(loss)):
        raise NonFiniteError(
            f"the loss of batch {b} is not finite.", "run in float32 (--dtype float32); check the model itself"
        )


def logits_of(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """Return the logits of a batch, computed on the device that the model is on."""
    mask = None if batch.attention_mask is None else batch.attention_mask.to(device)
    return model(input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False).logits


def rows_of(batch: Batch, model: nn.Module) -> Iterator[slice]:
    """Split a batch into parts whose logits are not too many."""
    vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr,operator]
    size = max(1, LOGITS_AT_ONCE // (batch.input_ids.shape[1] * vocabulary))
    if size >= len(batch.input_ids):
        yield slice(None)
        return
    for start in range(0, len(batch.input_ids), size):
        yield slice(start, start + size)


def part_of(batch: Batch, rows: slice) -> Batch:
    """Return some windows of a batch."""
    return Batch(batch.input_ids[rows], None if batch.attention_mask is None else batch.attention_mask[rows])


def step_back(
    runner: BlockRunner,
    index: int,
    inputs: list[HiddenState],
    gradients: list[HiddenState],
    before: Callable[[Batch], None] | None = None,
) -> None:
    """Compute block `index` again and differentiate it; `gradients` become those by the states that enter it.

    Args:
        runner: has embedded its batches.
        index: which block.
        inputs: states that enter the block, one for each batch.
        gradients: of the loss by the states after the block, one for each batch; changed in place.
        before: called with each batch before the block runs on it.

    Raises:
        NonFiniteError: NaN or infinity among the new gradients.
    """
    with runner.placed_block(index), frozen(runner.model):
        for b, batch in enumerate(runner.batches):
            if before is not None:
                before(batch)
            state = inputs[b].leaves(runner.device)
            with torch.enable_grad():
                after = runner.run(index, b, state)
            gradient = pulled_back(state, after, gradients[b])
            if not all(bool(torch.isfinite(g).all()) for g in (gradient.hidden, *gradient.handed.values())):
                raise NonFiniteError(
                    f"NaN or infinity in the gradient by the input of block '{runner.path}.{index}' (batch {b}).",
                    "run in float32 (--dtype float32)",
                )
            gradients[b] = runner.to_host(gradient)


def check_differentiable(model: nn.Module) -> None:
    """Make sure, on a few tokens, that gradients pass from the loss to the embeddings.

    Raises:
        ModelError: they do not.
    """
    device = next(model.parameters()).device
    batch = Batch(torch.arange(PROBE_TOKENS, device=device)[None])
    try:
        with evaluating(model), frozen(model), _differentiable_embeddings(model) as embedded, torch.enable_grad():
            loss = next_token_loss(logits_of(model, batch, device), batch)
            torch.autograd.grad(loss, embedded[0])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, AttributeError) as error:  # NotImplementedError is a RuntimeError
        raise ModelError(
            f"no gradients pass through {type(model).__name__}: {error}",
            "use a method that needs no gradients, e.g. --method svd_llm",
        ) from error


@contextmanager
def _differentiable_embeddings(model: nn.Module) -> Iterator[list[Tensor]]:
    """Make embeddings require a gradient inside the context; yield a list whose last entry is that of the last pass."""
    embedded: list[Tensor] = []

    def differentiable(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embedded[:] = [output.detach().requires_grad_()]
        return embedded[0]

    handle = model.get_input_embeddings().register_forward_hook(differentiable)  # type: ignore[operator]
    try:
        yield embedded
    finally:
        handle.remove()


def whole_model_gradients(runner: BlockRunner, before: Callable[[Batch], None]) -> Iterator[None]:
    """Run the model forwards and backwards, computing nothing twice: for a resident model.

    Batches go through in parts whose logits are not too many; memory is that of the activations of one part in all
    blocks. Hooks see the same as in `step_back`. Yields after every batch.

    Args:
        runner: in a resident session; need not have embedded anything.
        before: called with each part before the model runs on it.

    Raises:
        NonFiniteError: the loss of a batch is NaN or infinite.
        ModelError: the model gives no logits, or they do not depend on its blocks.
    """
    with frozen(runner.model), _differentiable_embeddings(runner.model) as embedded:
        for b, batch in enumerate(runner.batches):
            for rows in rows_of(batch, runner.model):
                part = part_of(batch, rows)
                before(part)
                with torch.enable_grad():
                    loss = next_token_loss(logits_of(runner.model, part, runner.device), part)
                check_loss(loss, runner.model, b)
                torch.autograd.grad(loss, embedded[0])
            yield
