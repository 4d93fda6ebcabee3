"""Numbers and text as reports show them."""

from __future__ import annotations


def millions(count: int) -> str:
    """Format a count as 134.5 M, or as 35.1 k below a million."""
    return f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count / 1e3:,.1f} k"


def megabytes(count: int) -> str:
    """Format bytes as 538.1 MB (decimal)."""
    return f"{count / 1e6:,.1f} MB"


def percent(fraction: float) -> str:
    """Format a fraction as 80.0 %."""
    return f"{100 * fraction:.1f} %"


def verdict(significant: bool | None) -> str:
    """Say whether a difference is significant, or that it rests on too few items to tell (None)."""
    return {True: "yes", False: "no", None: "too few"}[significant]


def code(text: str) -> str:
    """Format text as a Markdown block that nothing in it can break."""
    return "\n".join("    " + line for line in text.splitlines()) or "    (nothing)"


def cell(value: object) -> str:
    """Format a value for a Markdown table, which it cannot break."""
    return " ".join(str(value).split()).replace("|", "\\|")
