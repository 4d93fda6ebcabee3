"""Find the decoder blocks of a model by structure, not by the model's name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from slimrank.errors import ModelError
from slimrank.layers.experts import Experts


def parameters_of(module: nn.Module) -> int:
    """Count the parameters of a module, tied ones once."""
    return sum(p.numel() for p in module.parameters())


def context_of(model: Any) -> int | None:
    """Return the context length in tokens, if the configuration states it."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "max_seq_len", "n_positions", "seq_length"):
        context = getattr(config, name, None)
        if isinstance(context, int) and context > 1:
            return context
    return None


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find the path and the `nn.ModuleList` of the decoder blocks.

    They are the outermost ModuleList with the most parameters, looked for in `model.get_decoder()` first, so
    that the vision tower of a vision-language model is not taken for its decoder.

    Raises:
        ModelError: there are none.
    """
    names = {id(module): name for name, module in model.named_modules()}
    for root in (_decoder(model), model):
        if root is None or id(root) not in names:
            continue
        lists = _outermost_lists(root)
        if lists:
            best = max(lists, key=parameters_of)
            return names[id(best)], best
    raise ModelError(
        f"{type(model).__name__} has no list of decoder blocks (an nn.ModuleList with linear layers inside).",
        "pass a decoder language model, as AutoModelForCausalLM loads it",
    )


def _decoder(model: nn.Module) -> nn.Module | None:
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    return decoder if isinstance(decoder, nn.Module) and decoder is not model else None


def _outermost_lists(root: nn.Module) -> list[nn.ModuleList]:
    found: list[nn.ModuleList] = []
    for child in root.children():
        if isinstance(child, nn.ModuleList):
            if any(p.dim() >= 2 for p in child.parameters()):
                found.append(child)
        else:
            found.extend(_outermost_lists(child))
    return found


def experts_by_kind(block: nn.Module, inside: str, paths: Iterable[str]) -> list[list[str]]:
    """Group layers of experts, which get the tokens that a router chooses, by their role.

    Experts are in a list beside a router, a module that scores as many as there are.

    Args:
        block: a decoder block.
        inside: its path, with a dot at the end.
        paths: paths of layers; those in other places are left out.
    """
    lists = tuple(f"{inside}{name}." for name in _expert_lists(block))
    kinds: dict[str, list[str]] = {}
    for path in paths:
        if path.startswith(lists):
            kinds.setdefault(without_numbers(path), []).append(path)
    return list(kinds.values())


def _expert_lists(block: nn.Module) -> Iterator[str]:
    modules = dict(block.named_modules())
    for name, module in modules.items():
        parent = modules[name.rpartition(".")[0]]
        if isinstance(module, nn.ModuleList) and (isinstance(parent, Experts) or _has_router(parent, len(module))):
            yield name


def _has_router(parent: nn.Module, count: int) -> bool:
    """Tell whether a module, or one directly inside it, has a matrix of that many rows."""
    matrices = (p for m in parent.children() for p in m.parameters(recurse=False) if p.dim() == 2)
    return count > 1 and any(len(matrix) == count for matrix in matrices)


def without_numbers(path: str) -> str:
    """Replace every number of a module path by "*": equal for layers with the same role (blocks, experts)."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def short_names(roles: Sequence[str]) -> dict[str, str]:
    """Shorten each dotted name to as few of its last words as make it unique."""
    return {role: next(name for name in _suffixes(role) if _only(name, role, roles)) for role in roles}


def _suffixes(role: str) -> list[str]:
    words = role.split(".")
    return [".".join(words[-count:]) for count in range(1, len(words) + 1)]


def _only(name: str, role: str, roles: Sequence[str]) -> bool:
    return name == role or not any(other != role and name in _suffixes(other) for other in roles)
