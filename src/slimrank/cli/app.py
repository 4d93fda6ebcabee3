"""The `slimrank` command: its subcommands, and how errors end it."""

from __future__ import annotations

import io
import json
import sys
from typing import Annotated, Any, ClassVar

import typer

from slimrank._version import __version__
from slimrank.cli import (
    benchmark,
    compare,
    compress,
    convert,
    correct,
    demo,
    doctor,
    evaluate,
    export,
    methods,
    narrow,
    plan,
    push,
    recover,
)
from slimrank.cli.lazy import LazyGroup
from slimrank.errors import RecipeError, SlimrankError
from slimrank.processes import is_leader, started_together

SHARED = ("compress", "recover", "evaluate")  # commands that several processes can run together


class _Group(LazyGroup):
    functions: ClassVar[list[Any]] = [
        compress.compress,
        plan.plan,
        recover.recover,
        convert.convert,
        correct.correct,
        narrow.narrow,
        evaluate.evaluate,
        benchmark.benchmark,
        export.export,
        push.push,
        compare.compare,
        methods.methods,
        doctor.doctor,
        demo.demo,
    ]


app = typer.Typer(
    cls=_Group,
    name="slimrank",
    help="""Make large language models smaller and faster by low-rank factorisation.

Begin with [bold]slimrank demo[/bold] (a small real model, no account needed). For your own model, estimate with
[bold]slimrank plan MODEL --keep 0.8[/bold], then run [bold]slimrank compress MODEL --keep 0.8 --out smaller[/bold].

MODEL is a hub id, a local folder, a GGUF file, or the word demo.""",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if started_together() > 1 and context.invoked_subcommand not in SHARED:
        if not is_leader():
            raise typer.Exit(1)  # the leader says why
        raise RecipeError(
            f"{started_together()} processes were started, and '{context.invoked_subcommand}' runs in one.",
            f"without torchrun: slimrank {context.invoked_subcommand} ...; these share their work: {', '.join(SHARED)}",
        )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exit with 0, 1 (a slimrank error), 2 (wrong usage) or 130 (interrupted)."""
    given = sys.argv[1:] if arguments is None else arguments
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # file names and model text may hold any character; showing one must not fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(given)
    except SlimrankError as error:
        _show_error(error, "--json" in given)
        raise SystemExit(1) from error


def _show_error(error: SlimrankError, as_json: bool) -> None:
    if as_json:
        record: dict[str, Any] = {"type": type(error).__name__, "message": error.message, "hint": error.hint}
        typer.echo(json.dumps({"error": record}))
        return
    typer.secho(f"error: {error.message}", fg="red", err=True)
    if error.hint:
        typer.secho(f"  try: {error.hint}", err=True)
