"""The compressible weights of a model, and a count of all the others.

Found by structure: every `nn.Linear` and `Conv1D` inside the decoder blocks, tied weights once, no
routers. `Coverage` counts what is not covered, by reason.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from slimrank.errors import ModelError, RecipeError
from slimrank.layers.base import compressed_layers
from slimrank.layers.dense import answers_linearly, weight_of
from slimrank.layers.experts import Experts
from slimrank.layers.forms import PAIR
from slimrank.layers.layer_form import LayerForm
from slimrank.models.structure import find_blocks, parameters_of, without_numbers

Kind = Literal["linear", "conv1d"]


@dataclass(frozen=True)
class Target:
    """One compressible weight.

    Attributes:
        path: dotted module path in the model.
        kind: "linear" (stored out x in) or "conv1d" (stored in x out).
        shape: (m, n) = (out, in).
        block: index of its decoder block.
        bias: whether the layer has a bias.
        ties: other module paths that hold the very same weight tensor.
    """

    path: str
    kind: Kind
    shape: tuple[int, int]
    block: int
    bias: bool
    ties: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Return m n."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Coverage:
    """Parameters of a model, compressed and left out; they add up to `total`.

    Attributes:
        total: parameters of the whole model, tied ones once.
        targets: parameters of the weights that will be compressed.
        left_out: reason -> parameters, for everything else.
        matrices: parameters of all weight matrices and expert banks inside the blocks.
    """

    total: int
    targets: int
    left_out: dict[str, int]
    matrices: int

    @property
    def of_matrices(self) -> float:
        """Return the fraction of the decoder's weight matrices that is covered."""
        return self.targets / self.matrices if self.matrices else 0.0


@dataclass(frozen=True)
class TargetSet:
    """All targets of a model, in model order, and what they cover."""

    targets: tuple[Target, ...]
    coverage: Coverage
    blocks_path: str

    def __iter__(self) -> Iterator[Target]:
        return iter(self.targets)

    def __len__(self) -> int:
        return len(self.targets)

    def in_block(self, block: int) -> list[Target]:
        """Return the targets of one decoder block."""
        return [t for t in self.targets if t.block == block]


def find_targets(
    model: nn.Module, targets: Sequence[str] = (), ignore: Sequence[str] = (), form: LayerForm = PAIR
) -> TargetSet:
    """Find every compressible weight of a model.

    Args:
        model: any decoder; its weights may be on the meta device.
        targets: patterns; when given, only weights whose path matches one are taken.
        ignore: patterns; weights whose path matches one are left out.
            A pattern is matched with fnmatch against the whole path and against its end
            ("*.mlp.*", "q_proj"), or is a regular expression after the prefix "re:".
        form: the layer form that ranks are chosen for; weights that no rank makes smaller are left out.

    Raises:
        ModelError: no decoder blocks, or nothing in them to compress.
        RecipeError: a pattern that matches no layer.
    """
    blocks_path, blocks = find_blocks(model)
    check_uncompressed(model)
    found: dict[int, Target] = {}
    reasons: dict[int, str] = {}
    layers = list(_linear_layers(blocks, blocks_path))
    _check_patterns((*targets, *ignore), [path for _, path, _, _ in layers])
    odd = _odd_classes([module for _, _, module, _ in layers])
    for index, path, module, around in layers:
        key = id(module.weight)
        reason = _reason_to_leave(path, module, around, targets, ignore, form)
        if not reason and type(module) in odd:
            reason = "linears that compute something of their own"
        if reason:
            reasons[key] = reason
        elif key in found:
            first = found[key]
            found[key] = Target(**{**vars(first), "ties": (*first.ties, path)})
        else:
            found[key] = _target(path, module, index)
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no weight to compress in '{blocks_path}'.",
            "loosen the target and ignore patterns"
            if targets or ignore
            else "its linears may be of a class that slimrank does not know (already quantised or compressed?)",
        )
    coverage = _coverage(model, blocks, found, reasons)
    return TargetSet(tuple(found.values()), coverage, blocks_path)


def check_uncompressed(model: nn.Module) -> None:
    """Make sure that a model is not already compressed by slimrank.

    Raises:
        ModelError: it is.
    """
    if compressed_layers(model):
        raise ModelError("the model is already compressed by slimrank.", "start from the original model")


def role_of(target: Target, blocks_path: str) -> str:
    """Return the place of a target in its block, without other numbers: equal for layers with the same role."""
    return without_numbers(target.path.removeprefix(f"{blocks_path}.{target.block}."))


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Tell whether a module path matches one of the patterns (see `find_targets`)."""
    return any(_matches(path, pattern) for pattern in patterns)


def _matches(path: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.search(pattern[3:], path) is not None
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*.{pattern}")


def _check_patterns(patterns: Sequence[str], paths: list[str]) -> None:
    for pattern in patterns:
        if not any(_matches(path, pattern) for path in paths):
            raise RecipeError(
                f"the pattern '{pattern}' matches no linear layer of the model.",
                "patterns look like '*.mlp.*', 'q_proj' or 're:layers\\.[0-3]\\.'; paths look like " + paths[0]
                if paths
                else "",
            )


def _linear_layers(blocks: nn.ModuleList, root: str) -> Iterator[tuple[int, str, nn.Module, list[nn.Module]]]:
    """Yield block index, path, layer, and the modules around it up to the block."""
    for index, block in enumerate(blocks):
        modules = dict(block.named_modules())
        for name, module in modules.items():
            if isinstance(module, (nn.Linear, Conv1D)):
                parts = name.split(".")
                around = [modules[".".join(parts[:i])] for i in range(len(parts))]
                yield index, f"{root}.{index}.{name}".rstrip("."), module, around


def _odd_classes(layers: Sequence[nn.Module]) -> set[type]:
    """Find classes of linear layers whose output is not W x + b; each is tried on its smallest layer."""
    smallest = {type(m): m for m in sorted(layers, key=lambda m: -m.weight.numel())}  # type: ignore[operator]
    return {kind for kind, layer in smallest.items() if not answers_linearly(layer)}


def _target(path: str, module: nn.Module, block: int) -> Target:
    m, n = weight_of(module).shape
    kind: Kind = "conv1d" if isinstance(module, Conv1D) else "linear"
    return Target(path, kind, (m, n), block, module.bias is not None)


def _reason_to_leave(
    path: str,
    module: nn.Module,
    around: Sequence[nn.Module],
    targets: Sequence[str],
    ignore: Sequence[str],
    form: LayerForm,
) -> str:
    m, n = weight_of(module).shape
    if not module.weight.is_floating_point():  # type: ignore[operator]
        return "quantised linears"
    if {name for name, _ in module.named_parameters()} - {"weight", "bias"} or any(True for _ in module.buffers()):
        return "linears with parts of their own"
    if _is_router(m, around):
        return "routers"
    if matches(path, ignore) or (targets and not matches(path, targets)):
        return "left out by pattern"
    if form.largest_rank(m, n, 8 * module.weight.element_size()) < 1:  # type: ignore[operator]
        return "too small to factor"
    return ""


def _is_router(out_features: int, parents: Sequence[nn.Module]) -> bool:
    """Tell whether a linear scores experts: exactly that many experts are beside it, or beside a module around it."""
    return out_features > 1 and any(_holds_experts(parent, out_features) for parent in parents)


def _holds_experts(parent: nn.Module, count: int) -> bool:
    for sibling in parent.children():
        lists = sibling.children() if isinstance(sibling, Experts) else [sibling]
        if any(isinstance(each, nn.ModuleList) and len(each) == count for each in lists):
            return True
        if any(_is_bank(p) and len(p) == count for p in _own_banks(sibling)):
            return True
    return False


def _own_banks(module: nn.Module) -> list[nn.Parameter]:
    return [] if isinstance(module, _ConvNd) else list(module.parameters(recurse=False))


def _is_bank(p: nn.Parameter) -> bool:
    """Tell whether a tensor is a 3-D stack of matrices (a convolution over channels and a time-mix vector are not)."""
    return p.dim() == 3 and min(p.shape) > 1


def _coverage(model: nn.Module, blocks: nn.ModuleList, found: dict[int, Target], reasons: dict[int, str]) -> Coverage:
    in_blocks = {id(p) for p in blocks.parameters()}
    embeddings = _embedding_ids(model)
    convolutions = {id(m.weight) for m in model.modules() if isinstance(m, _ConvNd)}
    left_out: dict[str, int] = {}
    matrices = covered = 0
    for p in model.parameters():
        matrices += p.numel() if id(p) in in_blocks and p.dim() >= 2 and id(p) not in embeddings else 0
        if id(p) in found:
            covered += p.numel()
            continue
        reason = _reason_of(p, reasons, embeddings, convolutions, id(p) in in_blocks)
        left_out[reason] = left_out.get(reason, 0) + p.numel()
    return Coverage(parameters_of(model), covered, left_out, matrices)


def _embedding_ids(model: nn.Module) -> set[int]:
    ids = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return ids | ({id(head.weight)} if head is not None else set())


def _reason_of(
    p: nn.Parameter, reasons: dict[int, str], embeddings: set[int], convolutions: set[int], in_block: bool
) -> str:
    if id(p) in reasons:
        return reasons[id(p)]
    if id(p) in embeddings:
        return "embeddings and lm_head"
    if _is_bank(p) and in_block and id(p) not in convolutions:
        return "expert banks (3-D, of a class of their own)"
    if id(p) in convolutions:
        return "convolutions"
    if p.dim() >= 2:
        return "other matrices in blocks (routers, state-space tables)" if in_block else "matrices outside the blocks"
    return "norms, biases and other vectors"
