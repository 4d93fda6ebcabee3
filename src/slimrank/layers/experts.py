"""Experts as linear layers. Copied into every saved model; imports nothing but torch.

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
        native: the module of fused experts, no submodule, without its 3-D parameters.

    Its other parts (a norm of each expert's answer, the activation) are submodules here, under the names they had.

    Args:
        native: the module with 3-D parameters, which loses them; they may be on the meta device.
    """

    def __init__(self, native: nn.Module) -> None:
        super().__init__()
        name = "gate_up_proj" if native.has_gate else "up_proj"
        self.up, self.down = _linears(native, name), _linears(native, "down_proj")
        for part, module in native.named_children():  # a norm; an activation, which may have parameters
            self.add_module(part, module)
        self.native: Any
        object.__setattr__(self, "native", native)  # no submodule: its parts are already
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
            if self.native.has_post_expert_norm:
                answer = self.native.post_expert_norm(answer)
            weighted = answer * top_k_weights[token, place, None]
            result.index_add_(0, token, weighted.to(result.dtype))
        return result

    def _between(self, hidden: Tensor) -> Tensor:
        return self.native._apply_gate(hidden) if self.native.has_gate else self.native.act_fn(hidden)


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
    own = {key: p.dim() for key, p in module.named_parameters(recurse=False)}
    names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    biases = [f"{name}_bias" for name in names] if module.has_bias else []
    return own == dict.fromkeys(names, 3) | dict.fromkeys(biases, 2) and not any(module.buffers(recurse=False))


def unfuse(model: nn.Module) -> list[str]:
    """Replace all modules of fused experts, in place; their paths."""
    paths = [path for path, module in model.named_modules() if is_fused(module)]
    for path in paths:
        model.set_submodule(path, Experts(model.get_submodule(path)))
    return paths


def fuse(model: nn.Module) -> None:
    """Undo `unfuse`, in place, wherever every expert is still a dense linear layer."""
    for path in experts_of(model):
        experts: Any = model.get_submodule(path)
        if all(isinstance(linear, nn.Linear) for linear in (*experts.up, *experts.down)):
            native = experts.native
            _fill(native, "gate_up_proj" if native.has_gate else "up_proj", experts.up)
            _fill(native, "down_proj", experts.down)
            model.set_submodule(path, native)


def _fill(native: Any, name: str, linears: Any) -> None:
    """Give a module of fused experts a 3-D parameter of the weights of linear layers, and their biases."""
    weights = [linear.weight.data.t() if native.is_transposed else linear.weight.data for linear in linears]
    trained = linears[0].weight.requires_grad
    native.register_parameter(name, nn.Parameter(torch.stack(weights), trained))
    if native.has_bias:
        biases = torch.stack([linear.bias.data for linear in linears])
        native.register_parameter(f"{name}_bias", nn.Parameter(biases, trained))


def experts_of(model: nn.Module) -> list[str]:
    """Paths of the modules that `unfuse` has put there."""
    return [path for path, module in model.named_modules() if isinstance(module, Experts)]
