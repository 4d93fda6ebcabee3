"""May a compressed model be published? The card says under which licence its original is."""

from __future__ import annotations

from typing import Any

from slimrank.checkpoint.output_folder import CARD
from slimrank.errors import ModelError

_NO_DERIVATIVES = ("cc-by-nd", "cc-by-nc-nd")


def check_licence(about: dict[str, Any]) -> None:
    """Make sure that the licence of the original lets everyone see the result.

    Args:
        about: the metadata of the model card.

    Raises:
        ModelError: none is stated, or it is one that forbids to share what was made of the model.
    """
    stated = str(about.get("license") or "")
    if not stated:
        raise ModelError(
            f"{CARD} states no licence, so slimrank does not know whether the model may be published.",
            f"--private, or state the licence of the original in {CARD}: a line 'license: ID' between the ---",
        )
    if stated.lower().startswith(_NO_DERIVATIVES):
        raise ModelError(
            f"the licence '{stated}' forbids to share what was made of the model, and a compressed one was.",
            "--private, or ask the authors of the original",
        )
