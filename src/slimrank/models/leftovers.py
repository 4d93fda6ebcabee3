"""Weights of a checkpoint that the model does not use: harmless ones are noted, all others are an error."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from slimrank.errors import ModelError

_BUFFERS = re.compile(
    r"(^|[._])(original_)?inv_freq$|\.(cos|sin)_cached$|^rope\.freqs$|(^|\.)position_ids$"
    r"|(attn|attention)\.(bias|masked_bias|causal_mask)$|_extra_state$"
)
_DRAFTS = re.compile(r"(^|[._])(mtp|nextn)([._]|$)")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks?)\.(\d+)\.")
_TOWERS = re.compile(r"(^|[._])(vision|visual|image|audio|encoder)")
_DRAFT_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "mtp_num_layers")


@functools.cache
def telling_class(model_class: Any) -> Any:
    """Make a subclass for loading, whose objects remember in `untaken` all weights that were not taken.

    transformers itself reports less: it omits what a class declares as negligible.
    """

    def adjust(self: Any, *told: Any) -> Any:
        self.untaken = set(told[-1] if isinstance(told[-1], set) else told[-1].unexpected_keys)
        return model_class._adjust_missing_and_unexpected_keys(self, *told)

    made = {"_adjust_missing_and_unexpected_keys": adjust, "__module__": model_class.__module__}
    return type(model_class.__name__, (model_class,), made)


def check_taken(spec: str | Path, model: Any, info: Mapping[str, Any], untaken: Iterable[str]) -> list[str]:
    """Make sure that the model has every weight that it needs, and that nothing of the checkpoint is lost.

    Args:
        spec: the model, as the user named it.
        model: as loaded.
        info: what transformers reports about loading.
        untaken: names of all weights in the files that the model has no place for.

    Returns:
        Notes on harmless leftovers.

    Raises:
        ModelError: weights are missing or of another shape, or some that count have no place.
    """
    missing = sorted(info.get("missing_keys") or [])
    if missing:
        raise ModelError(
            f"the checkpoint '{spec}' lacks {len(missing)} weights, e.g. '{missing[0]}'.",
            "it may belong to another architecture, or be incomplete; download it again",
        )
    for name, stored, wanted in sorted(info.get("mismatched_keys") or []):
        raise ModelError(
            f"the weight '{name}' of '{spec}' is {tuple(stored)} in the files and {tuple(wanted)} by config.json.",
            "the weight files belong to another configuration; download the model again",
        )
    declared = set(untaken) - set(info.get("unexpected_keys") or [])
    by_reason: dict[str, list[str]] = {}
    for name in sorted({*untaken, *(info.get("unexpected_keys") or [])}):
        by_reason.setdefault(_reason(name, model.config, name in declared), []).append(name)
    lost = by_reason.pop("", [])
    if lost:
        raise ModelError(
            f"the checkpoint '{spec}' holds {len(lost)} weights that {type(model).__name__} has no place for, e.g. "
            f"{_some(lost)}{_counted(lost, model.config)}.",
            "correct config.json (layers, biases, architectures), or use the files of the language model alone",
        )
    return [f"left out: {len(names)} weights, {why}: {_some(names)}" for why, names in by_reason.items()]


def correct_ties(model: Any) -> list[str]:
    """Let a configuration that ties the output head say that it is not tied, where the files hold another head.

    Returns:
        A note, if that is so.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    weights = [getattr(module, "weight", None) for module in (head, embedding)]
    if not getattr(model.config, "tie_word_embeddings", False) or None in map(_shape, weights):
        return []
    if weights[0] is weights[1] or _shape(weights[0]) != _shape(weights[1]):
        return []
    model.config.tie_word_embeddings = False
    return ["config.json ties the output head to the embedding, but the files hold a separate head, which is used"]


def _shape(weight: Any) -> Any:
    return getattr(weight, "shape", None)


def _reason(name: str, config: Any, declared: bool) -> str:
    """Return why a weight may be left out; empty if it may not.

    Args:
        name: of the weight.
        config: of the model.
        declared: whether the class of the model says that it does not need it.
    """
    if _BUFFERS.search(name):
        return "which the model computes itself"
    if _DRAFTS.search(name) or (_beyond(name, config) and _drafts(config)):
        return "a draft head (multi-token prediction), which transformers does not build"
    if declared and not _beyond(name, config) and not _TOWERS.search(name):
        return f"which {config.model_type} of transformers does not use"
    return ""


def _beyond(name: str, config: Any) -> bool:
    """Tell whether a weight belongs to a layer that the configuration does not count."""
    found, count = _LAYER.search(name), _layers(config)
    return found is not None and count is not None and int(found[1]) >= count


def _layers(config: Any) -> int | None:
    return getattr(config.get_text_config(), "num_hidden_layers", None)


def _drafts(config: Any) -> bool:
    text = config.get_text_config()
    return any(getattr(text, name, None) for name in _DRAFT_COUNTS)


def _counted(names: list[str], config: Any) -> str:
    return f" (config.json counts {_layers(config)} layers)" if _beyond(names[0], config) else ""


def _some(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:3]) + (", ..." if len(names) > 3 else "")
