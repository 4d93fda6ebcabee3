"""slimrank compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slimrank.cli import options as o
from slimrank.cli.console import ConsoleProgress, print_json, print_numbers, print_text, say_quietly
from slimrank.cli.evaluate import requested_tasks

_GRID, _MEASURE = "What to compare", "Measured on"
_SPARE = ("seconds", "decode", "95 %", "KL", "kept", "size")


@o.takes_recipe("calibration", "chat", "samples")
def compare(
    model: o.Model,
    chosen: dict[str, Any],
    out: Annotated[Path, typer.Option("--out", help="Folder for the results; the same again resumes.")],
    recipes: Annotated[
        list[Path] | None, typer.Argument(help="Recipe files (YAML), each at its own budget or at every --keep.")
    ] = None,
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.", rich_help_panel=_GRID)] = "",
    allocations: Annotated[
        str, typer.Option(help="Allocations of each method.  \\[default: uniform]", rich_help_panel=_GRID)
    ] = "",
    presets: Annotated[str, typer.Option(help="Presets, separated by commas.", rich_help_panel=_GRID)] = "",
    keep: Annotated[
        str, typer.Option(help="Fractions of the linears' parameters to KEEP: 0.8,0.6", rich_help_panel=_GRID)
    ] = "",
    max_bytes: Annotated[str, typer.Option(help="Sizes on disk: 110000000,90000000", rich_help_panel=_GRID)] = "",
    baselines: Annotated[
        str,
        typer.Option(help="The original in few bits, as rows of their own: 8,6,5,4,3", rich_help_panel=_GRID),
    ] = "",
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE of a recipe, for all of them; repeatable.", rich_help_panel=_GRID),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text to measure on; repeatable.  \\[default: demo]", rich_help_panel=_MEASURE),
    ] = None,
    windows: Annotated[int, typer.Option(help="First windows of each text.", min=2, rich_help_panel=_MEASURE)] = 16,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens a window.  \\[default: 512]", min=2, rich_help_panel=_MEASURE)
    ] = None,
    tasks: o.Tasks = None,
    tasks_dir: o.TasksDir = None,
    shots: o.Shots = None,
    limit: o.Limit = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    json: o.Json = False,
) -> None:
    """Compress a model by several recipes and compare the results: perplexity, tasks, KL, size, speed, time.

    Cells run one after the other, each in a process of its own; statistics and spectra are shared. What is done is not
    done again, and a cell that fails does not stop the others. Writes comparison.html, .md and .json.

    Example: slimrank compare demo --methods svd_llm,kfac_svd --allocations uniform,spectrum --keep 0.8,0.6 --out cmp
    """
    from slimrank import comparison

    keeps, sizes = _numbers(keep), [int(size) for size in _numbers(max_bytes)]
    length = {} if seq_len is None else {"seq_len": seq_len}
    shared = {**chosen, **length, **(o.pairs(option) or {})}
    cells = [
        *comparison.from_files(recipes or [], keeps, shared, sizes),
        *comparison.grid(_names(methods), _names(allocations), _names(presets), keeps, shared, sizes),
        *comparison.in_few_bits(_names(baselines), shared),
    ]
    request = requested_tasks(tasks, tasks_dir, shots, limit)
    say_quietly()
    try:
        with ConsoleProgress() as progress:
            record = comparison.compare(
                model, cells, out, texts=text or ["demo"], windows=windows, seq_len=seq_len, tasks=request,
                device=device, dtype=dtype, progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt as error:
        typer.secho("\ninterrupted; give the same command again to resume", err=True)
        raise typer.Exit(130) from error
    print_json(record) if json else _show(record, out)
    if any(cell["error"] is not None for cell in record["cells"].values()):
        raise typer.Exit(1)


def _show(record: dict[str, Any], out: Path) -> None:
    from slimrank.report.comparison import failures, headline

    headings, *lines = headline(record)
    print_numbers(f"on {record['texts'][0]}", headings, lines, _SPARE)
    print_text("* marks Pareto-optimal cells. KL: nats a token from the original. decode: over the original")
    for name, message, hint in failures(record):
        print_text(f"{name} failed: {message} ({hint})")
    print_text(f"written to {out}: comparison.html, comparison.md, comparison.json")


def _names(given: str) -> list[str]:
    return [name.strip() for name in given.split(",") if name.strip()]


def _numbers(given: str) -> list[float]:
    """Read a list of numbers.

    Raises:
        RecipeError: one of them is not a number.
    """
    from slimrank.errors import RecipeError

    try:
        return [float(number) for number in _names(given)]
    except ValueError as error:
        raise RecipeError(f"'{given}' is not a list of numbers.", "--keep 0.8,0.6") from error
