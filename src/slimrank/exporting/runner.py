"""What the runners of all engines share: masks, positions and greedy generation, without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from slimrank.errors import ModelError

PURPOSE = "running an exported model"


class Runner:
    """An exported model in its engine.

    Args:
        file: the model in its folder; None for one in memory.

    Attributes:
        stops: tokens that end a text.
        names: inputs of the model.
    """

    names: set[str]

    def __init__(self, file: Path | None) -> None:
        self.stops = frozenset() if file is None else _stops_beside(file)
        self._mask: np.ndarray | None = None

    def reset(self) -> None:
        """Forget all tokens."""
        self._mask = None
        self._forget()

    def step(self, input_ids: Any, attention_mask: Any = None, beams: Any = None) -> np.ndarray:
        """Read more tokens and return their logits (texts x tokens x vocabulary).

        Args:
            input_ids: texts x tokens.
            attention_mask: of these tokens: 0 where one is padding. All count by default.
            beams: for each text, which one of those before it goes on from; by default itself.
        """
        ids = np.asarray(input_ids, dtype=np.int64)
        new = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask, dtype=np.int64)
        chosen = np.arange(len(ids), dtype=np.int32) if beams is None else np.asarray(beams, dtype=np.int32)
        before = np.zeros((len(ids), 0), np.int64) if self._mask is None else self._mask[chosen]
        self._mask = np.concatenate([before, new], 1)
        places = np.maximum(self._mask.cumsum(1) - 1, 0)[:, before.shape[1] :]
        given = {"input_ids": ids, "attention_mask": self._mask, "position_ids": places}
        return self._compute({name: value for name, value in given.items() if name in self.names}, chosen)

    def generate(self, input_ids: Any, max_new_tokens: int = 32, attention_mask: Any = None) -> np.ndarray:
        """Continue texts by the likeliest token each time; return prompts and new tokens.

        A text ends at a token that the model's generation configuration names as its end. What follows it, while other
        texts go on, is that token again.

        Args:
            input_ids: texts x tokens, padded on the left.
            max_new_tokens: how many to add at most.
            attention_mask: of the prompts: 0 where a token is padding. All count by default.
        """
        self.reset()
        ids = np.asarray(input_ids, dtype=np.int64)
        ended = np.zeros(len(ids), dtype=bool)
        logits = self.step(ids, attention_mask)
        for number in range(max_new_tokens):
            likeliest = logits[:, -1].argmax(-1)
            chosen = np.where(ended, ids[:, -1], likeliest)[:, None]
            ids = np.concatenate([ids, chosen], 1)
            ended |= np.isin(chosen[:, 0], list(self.stops))
            if ended.all() or number + 1 == max_new_tokens:
                break
            logits = self.step(chosen)
        return ids

    def _forget(self) -> None:
        """Empty the cache of the engine."""
        raise NotImplementedError

    def _compute(self, given: dict[str, np.ndarray], beams: np.ndarray) -> np.ndarray:
        """Return the logits of new tokens; the cache continues the texts that `beams` names."""
        raise NotImplementedError


def model_in(folder: Path, name: str) -> Path:
    """Return the file of the model in a folder that `export` wrote.

    Raises:
        ModelError: there is none.
    """
    path = folder.expanduser() / name
    if not path.is_file():
        raise ModelError(f"'{folder}' holds no exported model: {name} is missing.", "slimrank export MODEL --out DIR")
    return path


def _stops_beside(file: Path) -> frozenset[int]:
    """Read the tokens that end a text."""
    path = file.with_name("generation_config.json")
    found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    return frozenset([] if found is None else [found] if isinstance(found, int) else found)
