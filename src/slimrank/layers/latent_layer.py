"""One layer of a cache of latents. Copied into saved models; imports nothing but torch and transformers."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from slimrank.layers.latent_sides import DifferentError, Latent, NewTokens, Plain
from slimrank.layers.rotations import Pair, Rotation, Rotations

NO_CALL = (
    "the cache was made for another model, or before the model was copied: call slimrank.latent_cache(model) for the "
    "model that uses it"
)


class LatentLayer(DynamicLayer):
    """Keeps latents (batch x 1 x tokens x rank) where transformers keeps keys or values.

    So what transformers does to a cache (beams, cropping, repeating) works on latents.

    Args:
        keys, values: how each side is kept.
        rotations: of the whole cache.
        ordinary: what the cache tells of sides that are kept as they are; this layer adds those that it turns off.
    """

    def __init__(
        self, keys: Latent | Plain, values: Latent | Plain, rotations: Rotations, ordinary: dict[str, str]
    ) -> None:
        super().__init__()
        self.sides: list[Latent | Plain] = [keys, values]
        self.rotations, self.ordinary = rotations, ordinary
        self._rotation: Rotation | None = None
        self._call: tuple[Tensor, Pair | None] | None = None

    def take(self, hidden: Tensor, turn: Any) -> None:
        """Note what the attention layer was called with, before it calls `update`.

        Args:
            hidden: batch x tokens x width.
            turn: the cosines and sines that it was given; anything else counts as none.
        """
        pair = isinstance(turn, tuple) and len(turn) == 2 and all(isinstance(t, Tensor) and t.dim() == 3 for t in turn)
        self._call = hidden, turn if pair else None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep what is needed of new tokens; return the keys and values of all.

        Raises:
            ValueError: the model did not say what they come from.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        tokens = self._tokens()
        self.keys, keys = self._joined(0, self.keys, key_states, tokens)
        self.values, values = self._joined(1, self.values, value_states, tokens)
        return keys, values

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = self._rotation = self._call = None
        self.is_initialized = False

    def _tokens(self) -> NewTokens:
        if self._call is None:
            raise ValueError(NO_CALL)
        (hidden, turn), self._call = self._call, None
        tokens = NewTokens(hidden, self.get_seq_length())
        if turn is None or isinstance(self.sides[0], Plain):
            return tokens
        if self._rotation is None:
            self._rotation = self.rotations.begin(turn)
        self._rotation.add(turn, tokens.seen)
        tokens.past, tokens.new = self._rotation.first(tokens.seen, hidden.device), turn
        return tokens

    def _joined(self, number: int, kept: Tensor, heads: Tensor, tokens: NewTokens) -> tuple[Tensor, Tensor]:
        """Join new tokens to one side; keep it as it is from now on if its latents do not give it."""
        side = self.sides[number]
        try:
            return side.join(kept, heads, tokens)
        except DifferentError as different:
            assert isinstance(side, Latent)
            past = heads[..., :0, :] if different.past is None else different.past
            self._turn_off(number, side.path)
            joined = torch.cat([past, heads], -2)
            return joined, joined

    def _turn_off(self, number: int, path: str) -> None:
        self.sides[number] = Plain()
        self.ordinary[path] = f"what its latents give differs from the {('keys', 'values')[number]} that attention uses"
        warnings.warn(f"the latent cache keeps '{path}' as it is: {self.ordinary[path]}", stacklevel=5)
