"""A section of a report: what a stage reports that the record has no field for."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A table with a title and a note; reports show it without knowing the stage."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    stage: str
    """The id of the stage."""
    title: str
    """The heading."""
    columns: tuple[str, ...] = ()
    """Names of the columns."""
    rows: tuple[tuple[str, ...], ...] = ()
    """The cells, formatted, one for each column."""
    note: str = ""
    """A sentence below the table."""
