"""A section of a report: what a stage tells that the record has no field for."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A table with a title and a note; reports show it without knowing the stage.

    Attributes:
        stage: the id of the stage.
        title: the heading.
        columns: names of the columns.
        rows: the cells, formatted, one for each column.
        note: a sentence below the table.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    title: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    note: str = ""
