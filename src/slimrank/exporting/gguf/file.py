"""Write a model of dense weights as a GGUF file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from slimrank.exporting.engine import need
from slimrank.exporting.gguf.architectures import Architecture, architecture_of, head_width, rope_factors, rotary
from slimrank.exporting.gguf.vocabulary import add_vocabulary

PURPOSE = "writing GGUF files"
MODEL_FILE = "model.gguf"
FACTORS = "rope_freqs.weight"  # what the frequencies of positions are divided by
BLOCK = 32  # numbers that share a scale in Q8_0
TYPES = {"float32": "F32", "float16": "F16", "int8": "Q8_0"}  # weights of an export -> types of GGUF
FILE_TYPES = {"float32": 0, "float16": 1, "int8": 7}  # numbers of `gguf.LlamaFileType`


@dataclass
class GgufModel:
    """A model that is to be written as GGUF.

    Attributes:
        model: in float32.
        architecture: of it.
        weights: "float32", "float16" or "int8".
        numbers: numbers of the weights by type, once they were written.
    """

    model: Any
    architecture: Architecture
    weights: str = "float32"
    numbers: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, model: Any) -> GgufModel:
        """Return a model as it is written.

        Raises:
            ModelError: see `architecture_of`.
        """
        return cls(model, architecture_of(model))

    def write(self, path: Path, tokenizer: Any = None) -> None:
        """Write the file; without a tokenizer, weights alone."""
        gguf = need("gguf", PURPOSE)
        writer = gguf.GGUFWriter(path, self.architecture.name)
        writer.add_name(Path(str(self.model.name_or_path or "model")).name)
        writer.add_file_type(FILE_TYPES[self.weights])
        _add_sizes(writer, gguf, self.model.config)
        if tokenizer is not None:
            add_vocabulary(writer, gguf, tokenizer, self.model.config.vocab_size)
        self.numbers.clear()
        for name, value in self._tensors(gguf):
            kind = self._type(gguf.GGMLQuantizationType, value)
            self.numbers[kind.name] += value.size
            writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def _type(self, types: Any, value: np.ndarray) -> Any:
        """Return the type of a tensor: vectors stay in float32, and rows that blocks do not divide in float16."""
        if value.ndim == 1:
            return types.F32
        whole = self.weights != "int8" or value.shape[-1] % BLOCK == 0
        return types[TYPES[self.weights]] if whole else types.F16

    def _tensors(self, gguf: Any) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the name in GGUF and the value of each parameter, tied ones once."""
        config = self.model.config
        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        names = gguf.get_tensor_name_map(kinds[self.architecture.name], config.num_hidden_layers)
        for path, parameter in self.model.named_parameters():
            name = names.get_name(path, try_suffixes=(".weight", ".bias"))
            yield name, _numpy(self.architecture.change(path, parameter.detach().float().cpu(), config))
        factors = rope_factors(self.model)
        if factors is not None:
            yield FACTORS, _numpy(factors)


def _numpy(value: Tensor) -> np.ndarray:
    return value.contiguous().numpy()


def _add_sizes(writer: Any, gguf: Any, config: Any) -> None:
    """Add the sizes of the architecture."""
    width = head_width(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_rotary(writer, gguf, config)


def _add_rotary(writer: Any, gguf: Any, config: Any) -> None:
    about = rotary(config)
    writer.add_rope_freq_base(about["rope_theta"])
    if about.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(about["factor"])
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_freq_base_swa(rotary(config, "sliding_attention")["rope_theta"])
