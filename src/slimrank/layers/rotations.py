"""The cosines and sines by which cached keys were turned. Copied into saved models; imports nothing but torch.

They are kept as they were used, not computed again from positions: some rotary embeddings change as a text grows.
Layers with the same ones share them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


class Rotation:
    """Cosines and sines (1 or batch x tokens x numbers) of all tokens in a cache."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos, self.sin = cos, sin

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.cos.shape[-2]

    def add(self, pair: Pair, seen: int) -> None:
        """Append those of new tokens after `seen` ones, unless another layer has done so."""
        if self.tokens == seen:
            self.cos, self.sin = (_appended(*both) for both in zip((self.cos, self.sin), pair, strict=True))

    def first(self, tokens: int, device: torch.device) -> Pair:
        """Return those of the first tokens."""
        return self.cos[..., :tokens, :].to(device), self.sin[..., :tokens, :].to(device)

    def equals(self, pair: Pair) -> bool:
        """Tell whether it holds exactly these."""
        return all(
            mine is new or (mine.shape == new.shape and torch.equal(mine, new.to(mine.device)))
            for mine, new in zip((self.cos, self.sin), pair, strict=True)
        )

    def change(self, how: Callable[[Tensor], Tensor], by_text: bool) -> None:
        """Change both tensors; a change of the texts in the batch leaves those alone that are the same for all."""
        if not by_text or self.cos.shape[0] > 1:
            self.cos, self.sin = how(self.cos), how(self.sin)


class Rotations:
    """All that the layers of one cache need."""

    def __init__(self) -> None:
        self.all: list[Rotation] = []

    def begin(self, pair: Pair) -> Rotation:
        """Return the rotation of a layer that begins with these; another layer's, where they are the same."""
        found = next((each for each in self.all if each.equals(pair)), None)
        if found is None:
            found = Rotation(*pair)
            self.all.append(found)
        return found

    def cut(self, tokens: int) -> None:
        """Keep the first tokens only."""
        for each in self.all:
            each.change(lambda t: t[..., :tokens, :], by_text=False)

    def of_texts(self, how: Callable[[Tensor], Tensor]) -> None:
        """Change the texts of the batch."""
        for each in self.all:
            each.change(how, by_text=True)


def _appended(old: Tensor, new: Tensor) -> Tensor:
    """Append tokens; where only one of both is the same for all texts, it is repeated."""
    texts = max(len(old), len(new))
    return torch.cat([old.expand(texts, -1, -1), new.to(old.device).expand(texts, -1, -1)], -2)
