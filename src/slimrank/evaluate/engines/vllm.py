"""vLLM, for folders of slimrank and any other model that it loads."""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from slimrank.errors import ModelError, RecipeError
from slimrank.evaluate.engine import ENGINES, Engine, Round, Running
from slimrank.evaluate.options import Loading
from slimrank.models.explained import explained
from slimrank.models.load import resolve, skeleton
from slimrank.models.storage import saved_bytes
from slimrank.models.structure import context_of, parameters_of
from slimrank.serving.vllm import need_engine

LONGEST = 8192  # tokens of a text; vLLM wants room for one of them before it starts
OF_THE_DEVICE = 0.4  # of an accelerator's memory, for each of two models
UNCOMPILED = "vLLM ran it without torch.compile (enforce_eager), which takes minutes on a CPU"
HERE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}  # in this process: two models in turns


class ServedModel(Running):
    """A model in vLLM, in this process."""

    def __init__(self, name: str, source: str, dtype: str) -> None:
        from vllm import LLM
        from vllm.platforms import current_platform

        empty = skeleton(name)
        context = min(LONGEST, context_of(empty.model) or LONGEST)
        with explained(name), _environment():
            self.engine = LLM(
                source, dtype=dtype, max_model_len=context, enable_prefix_caching=False, skip_tokenizer_init=True,
                disable_log_stats=True, enforce_eager=current_platform.is_cpu(), gpu_memory_utilization=OF_THE_DEVICE,
            )  # fmt: skip
        self.name, self.notes = name, [UNCOMPILED] if current_platform.is_cpu() else []
        self.dtype = str(self.engine.llm_engine.model_config.dtype).removeprefix("torch.")
        self.parameters, self.weight_bytes = parameters_of(empty.model), saved_bytes(empty.model)
        self.vocabulary = empty.model.get_input_embeddings().weight.shape[0]
        self.context = context - 1  # one token more is asked for than counts

    def round(self, ids: Tensor, new_tokens: int) -> Round:
        """See `Running.round`; decoding is what all new tokens take beyond the first, which ends the prompt."""
        prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
        prefill = self._seconds(prompts, 1)
        return Round(prefill, self._seconds(prompts, new_tokens + 1) - prefill)

    def _seconds(self, prompts: list[Any], count: int) -> float:
        from vllm import SamplingParams

        wanted = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        self.engine.generate(prompts, wanted, use_tqdm=False)
        return time.perf_counter() - start


@ENGINES.add
class Vllm(Engine):
    """vLLM with the plug-in of slimrank."""

    id: ClassVar[str] = "vllm"
    title: ClassVar[str] = "vLLM, with the plug-in of slimrank"

    def load(self, model: str | Path, loading: Loading) -> Running:
        """See `Engine.load`.

        Raises:
            MissingExtraError: vLLM is not installed.
            ModelError: vLLM is too old, does not know slimrank, or does not take the model.
            RecipeError: a device by name: vLLM is built for one kind.
        """
        need_engine()
        if loading.device != "auto":
            raise RecipeError("vLLM runs on the device that it was built for.", "leave out --device")
        source = resolve(model, loading.progress)
        if source.endswith(".gguf"):
            raise ModelError(f"vLLM does not load the GGUF file '{model}'.", "give a folder: slimrank.load, then save")
        return ServedModel(str(model), source, loading.dtype)

    def versions(self) -> dict[str, str]:
        """See `Engine.versions`."""
        import vllm

        return {"vllm": vllm.__version__, "torch": importlib.metadata.version("torch")}


@contextmanager
def _environment() -> Iterator[None]:
    """Set what vLLM reads while it starts, where the user has not; afterwards all is as before."""
    added = {name: value for name, value in HERE.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
