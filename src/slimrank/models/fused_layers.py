"""Split fused weights of a model into layers, and back: experts, and what a recipe's patterns split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from slimrank.errors import RecipeError
from slimrank.layers.dense import weight_of
from slimrank.layers.experts import fuse, unfuse
from slimrank.layers.split import join_linears, split_linears
from slimrank.models.structure import find_blocks
from slimrank.models.targets import check_uncompressed, matches

Parts = int | Sequence[int] | Literal["qkv"]


def split_layers(model: nn.Module, wanted: Mapping[str, Parts]) -> list[str]:
    """Make every expert, and every part that `wanted` names, a linear layer of its own; the paths of the experts.

    Raises:
        ModelError: no decoder, or a model that slimrank has made: its parts stay as they are.
        RecipeError: see `sizes_of_parts`.
    """
    find_blocks(model)
    check_uncompressed(model)
    experts = unfuse(model)
    split_linears(model, sizes_of_parts(model, wanted))
    return experts


def join_layers(model: nn.Module) -> None:
    """Undo `split_layers`, wherever nothing was compressed in between."""
    join_linears(model)  # experts are fused only where their layers are whole
    fuse(model)


def sizes_of_parts(model: nn.Module, wanted: Mapping[str, Parts]) -> dict[str, list[int]]:
    """Return, for every linear layer in the blocks that is to be split, the outputs of its parts.

    Args:
        model: a decoder; its weights may be on the meta device.
        wanted: pattern (as for targets) -> a number of equal parts, the outputs of each part, or "qkv": heads of
            queries, keys and values as the configuration counts them. Of several patterns that match, the last counts.

    Raises:
        RecipeError: a pattern that matches no linear layer, parts that do not add up to a layer, or a layer whose
            weight is tied.
    """
    root, blocks = find_blocks(model)
    layers = {f"{root}.{name}": m for name, m in blocks.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    places = Counter(id(m.weight) for m in model.modules() if isinstance(getattr(m, "weight", None), nn.Parameter))
    found: dict[str, list[int]] = {}
    for pattern, parts in wanted.items():
        matching = [path for path in layers if matches(path, [pattern])]
        if not matching:
            some = next(iter(layers), "")
            raise RecipeError(f"the pattern '{pattern}' of 'split' matches no linear layer.", f"paths look like {some}")
        for path in matching:
            if places[id(layers[path].weight)] > 1:
                raise RecipeError(f"'{path}' cannot be split: its weight is tied to other layers.", "leave it whole")
            found[path] = _sizes(path, weight_of(layers[path]).shape[0], parts, model)
    return found


def _sizes(path: str, outputs: int, parts: Parts, model: Any) -> list[int]:
    if isinstance(parts, int):
        if outputs % parts:
            raise RecipeError(
                f"the {outputs} outputs of '{path}' are not {parts} equal parts.", "name the outputs of each: [64, 32]"
            )
        return [outputs // parts] * parts
    sizes = _heads(model.config.get_text_config()) if parts == "qkv" else [int(size) for size in parts]
    if sum(sizes) != outputs:
        raise RecipeError(
            f"{' + '.join(map(str, sizes))} = {sum(sizes)} outputs do not make up '{path}', which has {outputs}.",
            "name the outputs of each part, or how many equal parts there are",
        )
    return sizes


def _heads(config: Any) -> list[int]:
    """Return the outputs of queries, keys and values."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    pairs = getattr(config, "num_key_value_heads", None) or heads
    return [heads * width, pairs * width, pairs * width]
