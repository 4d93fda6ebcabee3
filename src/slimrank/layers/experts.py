"""Experts as linear layers. Copied into saved models; imports nothing but torch.

transformers keeps the experts of a block as two 3-D parameters (gate_up_proj or up_proj, and down_proj), one slice for
each expert. As `Experts` every slice is an `nn.Linear` of its own, which can be measured, replaced and saved like any
other. What an expert computes (gate, activation, a norm) is still that of the native class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slimrank.layers.transforms import Transform

_MARKS = ("num_experts", "has_bias", "is_transposed")
_LATER = {"has_gate": True, "has_post_expert_norm": False}  # what is so where transformers has no such mark yet
_SORTED = {"has_bias": False, "is_transposed": True}  # Llama 4, which has none of these marks


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
        for mark, value in _LATER.items():
            setattr(native, mark, getattr(native, mark, value))
        name = "gate_up_proj" if native.has_gate else "up_proj"
        self.up, self.down = _linears(native, name), _linears(native, "down_proj")
        for part, module in native.named_children():  # a norm; an activation, which may have parameters
            self.add_module(part, module)
        self.native: Any
        object.__setattr__(self, "native", native)  # no submodule: its parts are already
        self.train(native.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum (tokens x width) of the outputs of the experts that each token is sent to.

        Args:
            hidden_states: tokens x width.
            top_k_index: tokens x k, numbers of experts; any other number means no expert.
            top_k_weights: tokens x k.
        """
        result = torch.zeros_like(hidden_states)
        for expert, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            token, place = self.sent(expert, hidden_states, top_k_index)
            if len(token) == 0:
                continue
            answer = down(self._between(up(hidden_states[token])))
            if self.native.has_post_expert_norm:
                answer = self.native.post_expert_norm(answer)
            weighted = answer * top_k_weights[token, place, None]
            result.index_add_(0, token, weighted.to(result.dtype))
        return result

    def sent(self, expert: int, hidden_states: Tensor, top_k_index: Tensor) -> tuple[Tensor, ...]:
        """Return the numbers of the tokens that an expert reads, in its order, and which of their k choices it is."""
        return torch.where(top_k_index == expert)

    def _between(self, hidden: Tensor) -> Tensor:
        return self.native._apply_gate(hidden) if self.native.has_gate else self.native.act_fn(hidden)


class SortedExperts(Experts):
    """The experts of Llama 4, which get a copy of all tokens each, one after the other, already weighted.

    A token that is not sent to an expert is zero in its copy, and so is the answer, which is not computed here.
    """

    def __init__(self, native: nn.Module) -> None:
        for mark, value in _SORTED.items():
            setattr(native, mark, value)
        super().__init__(native)

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """Return the outputs (experts * tokens x width) for the copies (experts * tokens x width)."""
        return torch.cat([self._answers(expert, hidden_states) for expert in range(len(self.up))])

    def sent(self, expert: int, hidden_states: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Return the numbers of the tokens that an expert reads, in its order."""
        return torch.where(hidden_states.chunk(len(self.up))[expert].any(dim=-1))

    def _answers(self, expert: int, hidden_states: Tensor) -> Tensor:
        copy, (token,) = hidden_states.chunk(len(self.up))[expert], self.sent(expert, hidden_states)
        result = torch.zeros_like(copy)
        if len(token) == 0:
            return result
        return result.index_add(0, token, self.down[expert](self._between(self.up[expert](copy[token]))))

    def _between(self, hidden: Tensor) -> Tensor:
        gate, up = hidden.chunk(2, dim=-1)
        return up * self.native.act_fn(gate)


class ExpertsAsLinears(Transform):
    """Modules of fused experts, by path, of which each expert is two linear layers."""

    kind: ClassVar[str] = "experts"
    order: ClassVar[int] = 10
    key: ClassVar[str] = "experts"

    def apply(self, model: nn.Module, entry: Mapping[str, Any]) -> None:
        """See `Transform.apply`."""
        for path in entry["experts"]:
            model.set_submodule(path, as_linears(model.get_submodule(path)))

    def undo(self, model: nn.Module) -> None:
        """See `Transform.undo`."""
        fuse(model)

    def entry(self, model: nn.Module) -> dict[str, Any] | None:
        """See `Transform.entry`."""
        paths = experts_of(model)
        return {"experts": paths} if paths else None

    def format(self, entry: Mapping[str, Any]) -> int:
        """See `Transform.format`."""
        return 3


def as_linears(native: nn.Module) -> Experts:
    """Return a module of fused experts as linear layers; see `is_fused`."""
    return SortedExperts(native) if _is_sorted(native) else Experts(native)


def _linears(native: nn.Module, name: str) -> nn.ModuleList:
    """Return a linear layer for each slice of a 3-D parameter, which is taken away; views of it where they can be."""
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
    """Tell whether a module holds experts as transformers' classes do (`use_experts_implementation`), or as Llama 4."""
    if _is_sorted(module):
        return True
    if not all(hasattr(module, mark) for mark in _MARKS):
        return False
    own = {key: p.dim() for key, p in module.named_parameters(recurse=False)}
    names = ["gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj"]
    biases = [f"{name}_bias" for name in names] if module.has_bias else []
    return own == dict.fromkeys(names, 3) | dict.fromkeys(biases, 2) and not any(module.buffers(recurse=False))


def _is_sorted(module: nn.Module) -> bool:
    """Tell whether a module holds experts as Llama 4 does: gated, transposed, without routing among its arguments."""
    banks = {key: p.shape for key, p in module.named_parameters(recurse=False)}
    if list(banks) != ["gate_up_proj", "down_proj"] or any(len(shape) != 3 for shape in banks.values()):
        return False
    count, width, both = banks["gate_up_proj"]
    fits = banks["down_proj"] == (count, both // 2, width) and hasattr(module, "act_fn")
    return fits and type(module).forward.__code__.co_argcount == 2  # self and the tokens


def unfuse(model: nn.Module) -> list[str]:
    """Replace all modules of fused experts, in place; their paths."""
    paths = [path for path, module in model.named_modules() if is_fused(module)]
    for path in paths:
        model.set_submodule(path, as_linears(model.get_submodule(path)))
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
    """List the paths of the modules that `unfuse` has put there."""
    return [path for path, module in model.named_modules() if isinstance(module, Experts)]
