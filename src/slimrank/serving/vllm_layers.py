"""Linear layers of vLLM that hold the factors of slimrank. Imported by the plug-in alone, inside of vLLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slimrank.errors import ModelError
from slimrank.serving.plan import ELSEWHERE, ServedPlan, paths_of
from slimrank.serving.sharding import Span, span_of
from slimrank.serving.slots import Slots
from slimrank.serving.vllm import METHOD

try:
    from vllm.distributed import get_pp_group, tensor_model_parallel_all_reduce
    from vllm.model_executor.layers.linear import (
        LinearBase,
        LinearMethodBase,
        QKVParallelLinear,
        RowParallelLinear,
        UnquantizedLinearMethod,
    )
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    from vllm.model_executor.models.utils import WeightsMapper
except ImportError:  # so that every module of slimrank imports everywhere
    LinearMethodBase = QuantizationConfig = object

# A native layer holds its bias itself; slimrank stores it with the factor that makes the outputs.
BIASES = {".B.bias": ".bias", ".base.bias": ".bias"}
REDUCED = ("pair", "pivot")  # kinds whose z has as many numbers as their rank


class SlimRankQuantization(QuantizationConfig):
    """What vLLM asks for the method of each layer."""

    def __init__(self, plan: ServedPlan) -> None:
        super().__init__()
        self.plan = plan
        self.taken: set[str] = set()
        self.loaded: set[str] = set()
        self.lent: dict[str, Tensor] = {}

    def get_name(self) -> str:
        """Return the name of the method."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes that layers compute in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the least GPU capability: any."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return further files to read: none."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SlimRankQuantization:
        """Read what `ServedConfig` wrote."""
        return cls(ServedPlan.read(config["slimrank"]))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take over the paths that the model of vLLM has."""
        self.plan = self.plan.renamed(hf_to_vllm_mapper.apply_dict)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Return the method of a layer: a dense layer has vLLM's own."""
        if not isinstance(layer, LinearBase):
            return None
        paths = paths_of(prefix, self.packed_modules_mapping, self.plan.splits)
        if not self.plan.paths.intersection(paths):
            return UnquantizedLinearMethod()
        self.taken.update(paths)
        return SlimRankLinearMethod(self, paths)

    def get_checkpoint_weight_mapper(self) -> Any:
        """Return how names in the folder become those of vLLM; called when weights are about to be read.

        Raises:
            ModelError: there are compressed layers that this model of vLLM has no linear layer for.
        """
        left = sorted(self.plan.paths - self.taken)
        if left and get_pp_group().world_size == 1:
            raise ModelError(f"vLLM has no linear layer for {len(left)} layers, the first '{left[0]}'.", ELSEWHERE)
        return WeightsMapper(orig_to_new_suffix=BIASES)


class SlimRankLinearMethod(LinearMethodBase):
    """How one layer of vLLM, which may be several of the model, holds and computes its factors."""

    def __init__(self, config: SlimRankQuantization, paths: list[str]) -> None:
        self.config, self.paths = config, paths
        self.slots: Slots
        self.reduces = False

    def create_weights(self, layer: Any, *sizes: Any, **named: Any) -> None:
        """Make room for the factors; the sizes are those that the layer has already.

        Raises:
            ModelError: the layer cannot be cut among so many processes, or has another shape.
        """
        numbers = range(len(self.paths))
        if len(layer.output_partition_sizes) != len(numbers):
            raise ModelError(f"'{layer.prefix}' of vLLM joins other layers than '{self.paths[0]}'.", ELSEWHERE)
        spans = [self._span(layer, number) for number in numbers]
        shapes = [self._shape(layer, number) for number in numbers]
        stored = [
            self.config.plan.stored(path, shape, layer.params_dtype)
            for path, shape in zip(self.paths, shapes, strict=True)
        ]
        split = layer.prefix in self.config.plan.splits
        self.slots = Slots(stored, spans, [f"part_{number}." if split else "" for number in numbers])
        for name, parameter in self.slots.parameters().items():
            _add(layer, name, parameter)

    def _shape(self, layer: Any, number: int) -> tuple[int, int]:
        """Return outputs and inputs of a whole layer."""
        size = layer.output_partition_sizes[number]
        if layer.tp_size == 1 or isinstance(layer, RowParallelLinear):
            return size, layer.input_size
        return size * layer.tp_size // self._copies(layer, number), layer.input_size

    def _copies(self, layer: Any, number: int) -> int:
        """Return how many processes hold the same outputs."""
        return layer.num_kv_head_replicas if number and isinstance(layer, QKVParallelLinear) else 1

    def _span(self, layer: Any, number: int) -> Span:
        """Return what this process holds of a layer."""
        if layer.tp_size == 1 or not hasattr(layer, "output_size_per_partition"):
            return Span()
        if isinstance(layer, RowParallelLinear):
            return span_of("row", layer.input_size, layer.input_size_per_partition, layer.tp_rank)
        total, _ = self._shape(layer, number)
        copies = self._copies(layer, number)
        return span_of("column", total, layer.output_partition_sizes[number], layer.tp_rank, copies)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Join what reads the same input, and let go of what was read."""
        config = self.config
        packed = self.slots.packed(config.lent, config.plan.lenders, _EngineProduct)
        for name in self.slots.names:
            _remove(layer, name)
        layer.slimrank = packed
        config.loaded.update(self.paths)
        if config.plan.borrowers <= config.loaded:
            config.lent.clear()
        # The sum over processes is of z, whose numbers are as many as the rank, not of all outputs.
        kind = self.slots.stored[0].kind
        is_cut = layer.tp_size > 1 and isinstance(layer, RowParallelLinear)
        self.reduces = is_cut and layer.reduce_results and kind in REDUCED
        if self.reduces:
            layer.reduce_results = False
        del self.slots

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the outputs."""
        if self.reduces:
            bias = None if layer.skip_bias_add else layer.bias
        y = layer.slimrank(x, tensor_model_parallel_all_reduce if self.reduces else None)
        return y if bias is None else y + bias


class _EngineProduct(nn.Module):
    """y = W x, by the product that vLLM has for this machine."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.method = UnquantizedLinearMethod()
        self.method.process_weights_after_loading(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return W x."""
        return self.method.apply(self, x)


def _add(layer: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter where its name in the folder says."""
    *path, last = name.split(".")
    for part in path:
        if not hasattr(layer, part):
            layer.add_module(part, nn.Module())
        layer = getattr(layer, part)
    layer.register_parameter(last, parameter)


def _remove(layer: nn.Module, name: str) -> None:
    """Take a parameter away, and the modules that held it."""
    first = name.partition(".")[0]
    if hasattr(layer, first):
        delattr(layer, first)
