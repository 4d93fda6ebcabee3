"""Errors that say what happened, where, and what to try.

Every class also derives from the built-in error that a caller would expect, so `except ValueError`
keeps working. `hint` is one sentence on what to try next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_LISTED_NAMES = 60  # names in one hint


class SlimrankError(Exception):
    """Base of all errors that slimrank raises on purpose."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  try: {self.hint}" if self.hint else self.message


class RecipeError(SlimrankError, ValueError):
    """An option is unknown, missing, or out of range."""


class ModelError(SlimrankError, ValueError):
    """The model cannot be loaded, or is not a decoder that slimrank can compress."""


class DataError(SlimrankError, ValueError):
    """Calibration or evaluation text is missing, unreadable or too short."""


class BudgetError(SlimrankError, ValueError):
    """No choice of ranks meets the budget."""


class PlanError(SlimrankError, ValueError):
    """A rank plan does not fit the model."""


class NonFiniteError(SlimrankError, ArithmeticError):
    """NaN or infinity in weights, activations or logits."""


class OutputError(SlimrankError, OSError):
    """The output folder cannot be written."""


class RunError(SlimrankError, RuntimeError):
    """A run directory belongs to a different run, or is damaged."""


class DownloadError(SlimrankError, OSError):
    """A file could not be fetched, or is not the file that was asked for."""


class HubError(SlimrankError, OSError):
    """The Hugging Face hub cannot be reached, refuses, or holds something else under that name."""


class MissingExtraError(SlimrankError, ImportError):
    """An optional dependency is needed and not installed."""

    def __init__(self, module: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package '{module}'.", f"pip install 'slimrank[{extra}]'")


def first_line(error: BaseException) -> str:
    """Shorten what an error says to its first line; the name of its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """Name the closest known names in a hint, or list them all if none is close and they are not too many."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return (
        "known: " + ", ".join(names)
        if len(names) <= MAX_LISTED_NAMES
        else f"none of the {len(names):,} known names is like it"
    )
