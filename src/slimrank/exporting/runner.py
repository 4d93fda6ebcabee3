"""Run an exported model: a thin runner for OpenVINO that needs neither torch nor transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from slimrank.errors import ModelError, RecipeError
from slimrank.exporting.engine import need

MODEL_FILE = "openvino_model.xml"
PRECISIONS = ("float32", "auto")
_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}


class OpenVinoModel:
    """A model that `slimrank export` wrote, compiled for the CPU.

    Args:
        folder: what `export` wrote; or an OpenVINO model in memory.
        precision: "float32": activations and the cache are of float32. "auto": what OpenVINO prefers on this machine.
            That is faster and less exact: bfloat16 where the processor has it, a cache of 8 bits, and inputs of layers
            with 8-bit weights rounded to 8 bits.
        threads: of the processor; all by default.

    Raises:
        MissingExtraError: OpenVINO is not installed.
        ModelError: the folder holds no exported model.
        RecipeError: another precision.
    """

    def __init__(self, folder: str | Path | Any, precision: str = "float32", threads: int | None = None) -> None:
        if precision not in PRECISIONS:
            raise RecipeError(f"'{precision}' is not a precision.", f"one of {', '.join(PRECISIONS)}")
        ov = need("openvino", "running an exported model")
        in_memory = not isinstance(folder, (str, Path))
        self.stops: frozenset[int] = frozenset() if in_memory else _stops_of(Path(folder))
        settings: dict[str, Any] = {"ENABLE_CPU_PINNING": False}  # a thread bound to a core that is busy waits for it
        settings |= _EXACT if precision == "float32" else {}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        self.compiled = ov.Core().compile_model(folder if in_memory else _file_in(Path(folder)), "CPU", settings)
        self.names = {name for port in self.compiled.inputs for name in port.get_names()}
        self._request = self.compiled.create_infer_request()
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self._request.reset_state()
        self._mask: np.ndarray | None = None

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
        given = {"input_ids": ids, "attention_mask": self._mask, "position_ids": places, "beam_idx": chosen}
        output = self._request.infer({name: value for name, value in given.items() if name in self.names})
        return np.array(output["logits"])

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


def _file_in(folder: Path) -> Path:
    path = folder.expanduser() / MODEL_FILE
    if not path.is_file():
        raise ModelError(
            f"'{folder}' holds no exported model: {MODEL_FILE} is missing.", "slimrank export MODEL --out DIR"
        )
    return path


def _stops_of(folder: Path) -> frozenset[int]:
    """Read the tokens that end a text."""
    path = _file_in(folder).with_name("generation_config.json")
    found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    return frozenset([] if found is None else [found] if isinstance(found, int) else found)
