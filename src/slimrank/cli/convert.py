"""slimrank convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slimrank.cli import options as o
from slimrank.cli.console import ConsoleProgress, print_json, print_text, say_quietly


def convert(
    model: Annotated[str, typer.Argument(help="Folder or hub id of the published model.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Folder to write the result to.", show_default=False)],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what slimrank wrote to --out before.")
    ] = False,
    json: o.Json = False,
) -> None:
    """Make a folder of slimrank out of a model that LEMS or ASVD compressed, without running its code.

    Example: slimrank convert published --out smaller
    """
    say_quietly()
    from slimrank.converting.api import convert as library_convert

    with ConsoleProgress() as progress:
        result = library_convert(model, out, overwrite=overwrite, progress=progress)
    print_json(result.record.plain()) if json else _show(result)


def _show(result: Any) -> None:
    print_text(result.record.summary())
    for note in result.record.notes:
        print_text(f"note: {note}")
    print_text(f"written to {result.out}: the model, README.md, conversion.json")
