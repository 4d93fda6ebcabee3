"""Where a model comes from: its name, its id on the hub, and the licence and languages that its card states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from slimrank.checkpoint.output_folder import CARD
from slimrank.models.load import resolve

_LICENCE = ("license", "license_name", "license_link")


def origin_of(model: Any) -> dict[str, Any]:
    """Return what a report says about the original.

    Args:
        model: what `compress` was given: the name of a model that can be loaded, or a loaded model.

    Returns:
        "name"; "hub_id", or None where it is not from the hub; "license", those of the fields license, license_name
        and license_link that its card states, read from the hub for a model that is from there; "language", the codes
        of languages that it states.
    """
    named = isinstance(model, (str, Path))
    name = str(model) if named else model.config.name_or_path
    hub_id = _hub_id(name) if named else _cached_id(name)
    stated = _stated(hub_id, name)
    return {
        "name": name or type(model).__name__,
        "hub_id": hub_id,
        "license": {key: stated[key] for key in _LICENCE if stated.get(key)},
        "language": _list(stated.get("language")),
    }


def _hub_id(name: str) -> str | None:
    """Return the hub name of a model, unless it names something local."""
    return name if resolve(name) == name and not Path(name).expanduser().exists() else None


def _cached_id(name: str) -> str | None:
    """Return the name of a loaded model, if files of the hub's model of that name are here."""
    if not name or Path(name).expanduser().exists():
        return None
    try:
        return name if isinstance(try_to_load_from_cache(name, "config.json"), str) else None
    except HFValidationError:
        return None


def _stated(hub_id: str | None, name: str) -> dict[str, Any]:
    """Return the metadata of the model's card."""
    card = Path(name).expanduser() / CARD
    if hub_id is None and not (name and card.is_file()):
        return {}
    try:
        data: dict[str, Any] = ModelCard.load(hub_id or card).data.to_dict()
    except Exception:  # no network, no card, metadata that is none: the libraries below raise many unrelated classes
        return {}
    return data


def _list(given: Any) -> list[str]:
    """Return the words of a field that may hold one, several or none."""
    return [str(each) for each in (given if isinstance(given, list) else [given] if given else [])]
