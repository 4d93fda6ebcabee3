"""What the user sees while a job runs, and after it. Progress goes to standard error.

Names of files, models and layers are shown as they are, without reading markup or emoji codes in them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from logging import ERROR, getLogger
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from slimrank.progress import Progress as LibraryProgress

LINE_EVERY = 10.0  # seconds between lines, where standard error is not a terminal


def say_quietly() -> None:
    """Keep the progress bars and advice of other libraries off the screen."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    getLogger("bitsandbytes").setLevel(ERROR)  # Trainer imports it, where it is installed
    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


class ConsoleProgress(LibraryProgress):
    """One bar for the whole job with the time left; plain lines where standard error is not a terminal."""

    def __init__(self) -> None:
        self.console = plain_console(stderr=True, highlight=False)
        self.costs: dict[str, float] = {}
        self.done_cost = 0.0
        self.current, self.steps, self.done = "", 1, 0
        self.begun = 0.0  # how much of the current stage was done when its steps were last declared
        self.start = self.last_line = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> ConsoleProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_bar()

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def plan(self, costs: dict[str, float]) -> None:
        """See `slimrank.progress`. Another plan begins another job, with its own bar."""
        self._stop_bar()
        self.costs, self.start = costs, time.monotonic()
        self.done_cost, self.current, self.steps, self.done = 0.0, "", 1, 0
        self.note(f"this will take about {duration(sum(costs.values()))}")
        if self.console.is_terminal:
            description = TextColumn("{task.description}", markup=False)
            columns = (description, BarColumn(), TextColumn("{task.fields[left]}"))
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task("starting", total=1.0, left="")
            self._bar.start()

    def stage(self, name: str, steps: int) -> None:
        """See `slimrank.progress`."""
        self.begun = self._part() if name == self.current else 0.0
        if name != self.current:
            self._leave_stage()
        self.current, self.steps, self.done = name, max(1, steps), 0
        self._show(force=True)

    def step(self, done: int = 1) -> None:
        """See `slimrank.progress`."""
        self.done = min(self.steps, self.done + done)
        self._show()

    def note(self, message: str) -> None:
        """See `slimrank.progress`."""
        self.console.print(message)

    def _leave_stage(self) -> None:
        names = list(self.costs)
        if self.current in names:
            self.done_cost = sum(self.costs[n] for n in names[: names.index(self.current) + 1])

    def fraction(self) -> float:
        """Return how much of the predicted cost of the job is done."""
        total = sum(self.costs.values())
        if not total:
            return self.done / self.steps
        here = self.costs.get(self.current, 0.0)
        return min(1.0, (self.done_cost + here * self._part()) / total)

    def _part(self) -> float:
        """Return how much of the current stage is done."""
        return self.begun + (1 - self.begun) * self.done / self.steps

    def _left(self) -> str:
        fraction, elapsed = self.fraction(), time.monotonic() - self.start
        if fraction < 0.02 or elapsed < 2:
            return ""
        return f"about {duration(elapsed * (1 - fraction) / fraction)} left"

    def _show(self, force: bool = False) -> None:
        text = f"{self.current} {self.done}/{self.steps}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.fraction(), description=text, left=self._left())
        elif force or time.monotonic() - self.last_line > LINE_EVERY:
            self.last_line = time.monotonic()
            self.console.print(f"  {text}  {self._left()}".rstrip())


def duration(seconds: float) -> str:
    """Format seconds for people: 40 s, 3 min, 2.5 h."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def one_line(text: str) -> str:
    """Replace every run of white space by one space."""
    return " ".join(text.split())


def print_json(record: Any) -> None:
    """Print one JSON document to standard output."""
    typer.echo(json.dumps(record, indent=1, default=str))


def print_table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table to standard output; the first column is text, the others are numbers."""
    table = Table(title=title or None, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    _stdout().print(table)


def print_numbers(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], spare: Sequence[str]) -> None:
    """Print a table to standard output whose numbers are always whole.

    If it is too wide, names are broken over lines; if it is still too wide, columns are left out.

    Args:
        title: above the table.
        columns: headings, all different; the first column is text, the others are numbers.
        rows: one text for each column.
        spare: columns that may be left out, the least important first.
    """
    console = _stdout()
    cells = {column: [row[i] for row in rows] for i, column in enumerate(columns)}
    left_out = []
    for column in spare:
        if _narrowest(_numbers("", cells), console) <= console.width:
            break
        del cells[column]
        left_out.append(column)
    console.print(_numbers(title, cells))
    if left_out:
        print_text(f"columns left out, for lack of room: {', '.join(left_out)}")


def _stdout() -> Console:
    return plain_console(width=None if sys.stdout.isatty() else 100)


def plain_console(**options: Any) -> Console:
    """Make a console that shows text as it is."""
    return Console(markup=False, emoji=False, **options)


def _numbers(title: str, cells: Mapping[str, Sequence[str]]) -> Table:
    table = Table(title=title or None, title_justify="left")
    for i, (column, texts) in enumerate(cells.items()):
        if i == 0:
            table.add_column(column, overflow="fold")
        else:
            width = max(map(len, (column, *texts)))
            table.add_column(column, justify="right", no_wrap=True, overflow="fold", min_width=width)
    for row in zip(*cells.values(), strict=True):
        table.add_row(*row)
    return table


def _narrowest(table: Table, console: Console) -> int:
    """Return the width of a table whose names are broken at every space."""
    return console.measure(table, options=console.options.update_width(10_000)).minimum


def print_text(text: str) -> None:
    """Print plain text to standard output."""
    typer.echo(text)
