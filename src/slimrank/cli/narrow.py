"""slimrank narrow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slimrank.cli import options as o
from slimrank.cli.console import ConsoleProgress, print_json, print_table, print_text, say_quietly


def narrow(
    model: o.Model,
    out: Annotated[Path, typer.Option("--out", help="Folder to write the model to.", show_default=False)],
    keep: Annotated[
        float,
        typer.Option("--keep", help="Fraction of the parameters of all linear layers to keep.", show_default=False),
    ],
    multiple: Annotated[int, typer.Option(help="New widths are multiples of it.", min=1)] = 64,
    select: Annotated[
        str, typer.Option(help="How hidden units are chosen: eliminate, pivoted or leverage.")
    ] = "eliminate",
    refit: Annotated[
        str,
        typer.Option(help="Layers solved for again: readers (those that read hidden units), or all (takes more text)."),
    ] = "readers",
    anchor: Annotated[
        float, typer.Option(help="1: fit the original's outputs; 0: those of the original weight here.", min=0, max=1)
    ] = 1.0,
    ridge: Annotated[float, typer.Option(help="Pull of the fit towards the original weight.", min=0)] = 1e-2,
    calibration: Annotated[str, typer.Option(help="Text to calibrate on: as for compress.")] = "demo",
    samples: Annotated[int, typer.Option(help="Windows of it.", min=1)] = 64,
    seq_len: Annotated[int | None, typer.Option(help="Tokens a window.  \\[default: 512]", min=2)] = None,
    eval_text: Annotated[
        list[str] | None, typer.Option(help="Text to measure on; repeatable.  \\[default: demo]")
    ] = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Measure nothing.")] = False,
    windows: Annotated[int, typer.Option(help="First windows of each of these.", min=2)] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the calibration windows.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Size of the largest weight file.")] = "5GB",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what slimrank wrote to --out before.")
    ] = False,
    json: o.Json = False,
) -> None:
    """Make the MLPs of a model narrow: a smaller dense model of the same class, which needs no slimrank.

    Example: slimrank narrow demo --keep 0.8 --out narrow
    """
    say_quietly()
    from slimrank.narrowing.api import narrow as library_narrow

    options: dict[str, Any] = {
        "keep_ratio": keep, "multiple": multiple, "select": select, "refit": refit, "anchor": anchor, "ridge": ridge,
        "calibration": calibration, "samples": samples, "seq_len": seq_len,
        "evaluation": () if no_eval else tuple(eval_text or ["demo"]), "windows": windows, "seed": seed,
        "device": device, "dtype": dtype, "max_shard_size": max_shard_size,
    }  # fmt: skip
    try:
        with ConsoleProgress() as progress:
            result = library_narrow(model, out=out, overwrite=overwrite, progress=progress, **options)
    except KeyboardInterrupt as error:
        typer.secho("\ninterrupted; nothing was written", err=True)
        raise typer.Exit(130) from error
    print_json(result.record.plain()) if json else _show(result)


def _show(result: Any) -> None:
    from slimrank.narrowing.record import QUALITY, SIZES

    record = result.record
    print_table(record.summary(), SIZES, record.sizes())
    if record.measured:
        print_table("over the original", QUALITY, record.quality())
    for note in record.notes:
        print_text(f"note: {note}")
    print_text(f"written to {result.out}: a {record.kind} that needs no slimrank, README.md, narrow.json")
