"""The keys, or the values, of one attention layer in a cache. Copied into saved models; imports nothing but torch.

A side keeps them as they are, or as latents from which it builds them again.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.layers.base import CompressedLinear
from slimrank.layers.latent_numbers import AsTheyAre, Int8
from slimrank.layers.rotations import Pair

CLOSE = 1e-3  # of a token's keys: a wrong way to build them gives errors of their own size
ROUNDINGS = 8  # of the dtype
Way = Callable[[Tensor, Pair | None], Tensor]  # keys (batch x heads x tokens x numbers) and what turns them


@dataclass
class NewTokens:
    """What an attention layer was called with.

    Attributes:
        hidden: batch x tokens x width, which its projections read.
        seen: tokens that the cache holds before them.
        past, new: what turns the keys of those, and of the new ones; None where nothing is known to.
    """

    hidden: Tensor
    seen: int
    past: Pair | None = None
    new: Pair | None = None


class Plain:
    """Keys or values as they are."""

    def join(self, kept: Tensor, heads: Tensor, tokens: NewTokens) -> tuple[Tensor, Tensor]:
        """Return what is kept from now on, and what attention uses.

        Args:
            kept: of the tokens before.
            heads: of the new tokens: batch x heads x tokens x numbers.
            tokens: what they come from.
        """
        joined = torch.cat([kept, heads], -2)  # copied, as transformers does: they may be a part of something larger
        return joined, joined


class Latent:
    """Latents of a projection; what attention uses is built from them at every step.

    Args:
        path: of the projection, in the model.
        layer: the projection.
        numbers: how latents are stored.
        norm: of the attention layer, that follows the projection; None if there is none.
        ways: how outputs may become what attention passes to the cache; those that do not are dropped.
    """

    def __init__(
        self,
        path: str,
        layer: CompressedLinear,
        numbers: AsTheyAre | Int8,
        norm: nn.Module | None = None,
        ways: tuple[Way, ...] = (),
    ) -> None:
        self.path, self.layer, self.numbers, self.norm = path, layer, numbers, norm
        self.ways: list[Way] = list(ways or (as_it_is,))
        self.checked = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Latent:
        """Copy it without the model's layers."""
        mine = Latent(self.path, self.layer, self.numbers, self.norm, tuple(self.ways))
        mine.checked = self.checked
        return mine

    def join(self, kept: Tensor, heads: Tensor, tokens: NewTokens) -> tuple[Tensor, Tensor]:
        """See `Plain.join`.

        Raises:
            DifferentError: the new ones are not what their latents give.
        """
        z = self.layer.latent(tokens.hidden)
        assert z is not None
        past = self.built(self.numbers.read(kept[:, 0], z.dtype), heads, tokens.past) if tokens.seen else None
        if not self.checked and not self._agrees(z, heads, tokens.new):
            raise DifferentError(past)
        new = self.numbers.stored(z)[:, None]
        if past is None:
            return new, heads
        return torch.cat([kept, new], -2), torch.cat([past, heads], -2)

    def built(self, z: Tensor, like: Tensor, turn: Pair | None) -> Tensor:
        """Return keys or values (batch x heads x tokens x numbers) of latents (batch x tokens x rank)."""
        return self.ways[0](self._heads(z, like.shape[-1]), turn).to(like.dtype)

    def _heads(self, z: Tensor, numbers: int) -> Tensor:
        y = self.layer.from_latent(z)
        by_head = self.norm is None or width_of(self.norm) == numbers
        if self.norm is not None and not by_head:
            y = self.norm(y)
        y = y.unflatten(-1, (-1, numbers))
        if self.norm is not None and by_head:
            y = self.norm(y)
        return y.transpose(1, 2)

    def _agrees(self, z: Tensor, heads: Tensor, turn: Pair | None) -> bool:
        """Keep the ways that give what attention passed; tell whether one is left.

        A single token at position 0 is turned by nothing, so that several may be left. They are told apart later.
        """
        with torch.no_grad():
            y = self._heads(z, heads.shape[-1])
            left = [way for way in self.ways if _same(way, y, turn, heads)]
        self.ways, self.checked = left or self.ways, len(left) == 1
        return bool(left)


class DifferentError(Exception):
    """The latents of a side do not give what attention passes.

    Attributes:
        past: what they gave for the tokens before, which was right; None if there are none.
    """

    def __init__(self, past: Tensor | None) -> None:
        super().__init__()
        self.past = past


def width_of(norm: nn.Module) -> int | None:
    """Return how many numbers a norm takes together; None if it does not say."""
    weight = getattr(norm, "weight", None)
    return weight.shape[-1] if isinstance(weight, Tensor) else None


def as_it_is(heads: Tensor, turn: Pair | None) -> Tensor:
    """Return keys or values that nothing turns."""
    return heads


def ways_of(attention: nn.Module) -> tuple[Way, ...]:
    """Return how an attention layer may turn its keys: all numbers, or the first, by a function of its file, or not."""
    function = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if function is None or list(inspect.signature(function).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return (as_it_is,)

    def turned(heads: Tensor, turn: Pair | None) -> Tensor:
        return heads if turn is None else function(heads, heads, *turn)[1]

    def turned_in_part(heads: Tensor, turn: Pair | None) -> Tensor:
        some = heads.shape[-1] if turn is None else turn[0].shape[-1]
        return torch.cat([turned(heads[..., :some], turn), heads[..., some:]], -1)

    return turned, turned_in_part, as_it_is


def _same(way: Way, y: Tensor, turn: Pair | None, heads: Tensor) -> bool:
    """Tell whether a way gives these heads, up to rounding, for every token."""
    try:
        found = way(y, turn)
    except RuntimeError:  # the shapes do not fit: another model turns its keys so
        return False
    if found.shape != heads.shape:
        return False
    wrong, whole = ((t.float()).pow(2).sum((1, 3)).sqrt() for t in (found - heads, heads))
    limit = max(CLOSE, ROUNDINGS * torch.finfo(heads.dtype).eps)
    return bool((wrong <= limit * whole + torch.finfo(torch.float32).tiny).all())
