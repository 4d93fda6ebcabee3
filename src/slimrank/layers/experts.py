"""Experts as linear layers. Copied into saved models that have some; imports nothing but torch.

transformers keeps the experts of a block as two 3-D parameters (gate_up_proj or up_proj, and down_proj), one slice for
each expert. As `Experts` every slice is an `nn.Linear` of its own, which can be measured, replaced and saved like any
other. What an expert computes (gate, activation, a norm) is still that of the native class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_MARKS = ("num_experts", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


class Experts(nn.Module):
    """The experts of one block, each of them two linear layers.

    Attributes:
        up: for each expert what its hidden units are made from (gate and up together where the native class gates).
        down: for each expert the way back.
        post_expert_norm: a norm of each expert's answer, where the native class has one.

    Args:
        native: the module with 3-D parameters, which loses them; they may be on the meta device.
    """

    def __init__(self, native: nn.Module) -> None:
        super().__init__()
        name = "gate_up_proj" if native.has_gate else "up_proj"
        self.up, self.down = _linears(native, name), _linears(native, "down_proj")
        self.post_expert_norm: Any = native.post_expert_norm if native.has_post_expert_norm else None
        object.__setattr__(self, "native", native)  # no submodule: it holds no weights, only what to compute
        self.train(native.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Answers (tokens x width) of the experts that each token (tokens x width) is sent to, weighted and summed.

        Args:
            hidden_states: tokens x width.
            top_k_index: tokens x k, numbers of experts; any other number is no expert.
            top_k_weights: tokens x k.
        """
        result = torch.zeros_like(hidden_states)
        for expert, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            token, place = torch.where(top_k_index == expert)
            if len(token) == 0:
                continue
            answer = down(self._between(up(hidden_states[token])))
            if self.post_expert_norm is not None:
                answer = self.post_expert_norm(answer)
            weighted = answer * top_k_weights[token, place, None]
            result.index_add_(0, token, weighted.to(result.dtype))
        return result

    def _between(self, hidden: Tensor) -> Tensor:
        native: Any = self.native
        return native._apply_gate(hidden) if native.has_gate else native.act_fn(hidden)


def _linears(native: nn.Module, name: str) -> nn.ModuleList:
    """A linear layer for each slice of a 3-D parameter, which is taken away; views of it where they can be."""
    bank = native.get_parameter(name)
    bias = native.get_parameter(f"{name}_bias") if native.has_bias else None
    linears = []
    for expert in range(len(bank)):
        weight = bank.data[expert].t().contiguous() if native.is_transposed else bank.data[expert]
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, bank.requires_grad)
        if bias is not None:
            linear.bias = nn.Parameter(bias.data[expert], bias.requires_grad)
        linears.append(linear)
    delattr(native, name)
    if bias is not None:
        delattr(native, f"{name}_bias")
    return nn.ModuleList(linears)


def is_fused(module: nn.Module) -> bool:
    """Whether a module keeps experts in the way that transformers' own classes do (`use_experts_implementation`)."""
    if not all(hasattr(module, mark) for mark in _MARKS):
        return False
    banks = dict(module.named_parameters(recurse=False))
    name = "gate_up_proj" if module.has_gate else "up_proj"
    return all(key in banks and banks[key].dim() == 3 for key in (name, "down_proj"))


def unfuse(model: nn.Module) -> list[str]:
    """Replace all modules of fused experts, in place; their paths."""
    paths = [path for path, module in model.named_modules() if is_fused(module)]
    for path in paths:
        model.set_submodule(path, Experts(model.get_submodule(path)))
    return paths


def experts_of(model: nn.Module) -> list[str]:
    """Paths of the modules that `unfuse` has put there."""
    return [path for path, module in model.named_modules() if isinstance(module, Experts)]
