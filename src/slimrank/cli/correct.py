"""slimrank correct."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slimrank.cli import options as o
from slimrank.cli.console import ConsoleProgress, print_json, print_table, print_text, say_quietly


def correct(
    quantised: Annotated[
        str, typer.Argument(help="A quantised model: a folder, a hub id or a GGUF file.", show_default=False)
    ],
    original: Annotated[str, typer.Option(help="The model that it was made of, not quantised.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Folder to write the adapter to.", show_default=False)],
    rank: Annotated[
        int | None, typer.Option(help="Size of the adapter: that of this rank in every layer.", min=1)
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Largest size of the adapter, in bytes.", min=1)] = None,
    method: Annotated[str, typer.Option(help="Decomposition method: see 'slimrank methods'.")] = "kfac_svd",
    allocation: Annotated[str, typer.Option(help="Rank allocation: see 'slimrank methods'.")] = "spectrum",
    sequential: Annotated[
        bool, typer.Option("--sequential/--no-sequential", help="Fit each layer again on the corrected stream.")
    ] = True,
    calibration: Annotated[str, typer.Option(help="Text to calibrate on: as for compress.")] = "demo",
    samples: Annotated[int, typer.Option(help="Windows of it.", min=1)] = 64,
    seq_len: Annotated[int | None, typer.Option(help="Tokens a window.  \\[default: 512]", min=2)] = None,
    eval_text: Annotated[
        list[str] | None, typer.Option(help="Text to measure on, before and after; repeatable.  \\[default: demo]")
    ] = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Measure nothing.")] = False,
    gguf: Annotated[
        bool, typer.Option("--gguf", help="Write adapter.gguf for llama.cpp, too, for a GGUF file.")
    ] = False,
    adapter_dtype: Annotated[str, typer.Option(help="What its numbers are stored in: float16 or float32.")] = "float16",
    windows: Annotated[int, typer.Option(help="First windows of each of these.", min=2)] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the calibration windows.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps, ...")] = "auto",
    run_dir: Annotated[
        Path | None,
        typer.Option(
            help="Store finished parts here and keep them, so that another size needs no new calibration.  "
            "\\[default: OUT.run, removed at the end]",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what slimrank wrote to --out before.")
    ] = False,
    json: o.Json = False,
) -> None:
    """Correct a model that is quantised already by a low-rank adapter, which PEFT loads over it.

    Example: slimrank correct quantised-model --original MODEL --rank 16 --out adapter
    """
    say_quietly()
    from slimrank.correcting.api import correct as library_correct

    options: dict[str, Any] = {
        "rank": rank, "max_bytes": max_bytes, "method": method, "allocation": allocation, "sequential": sequential,
        "calibration": calibration, "samples": samples, "seq_len": seq_len,
        "evaluation": () if no_eval else tuple(eval_text or ["demo"]), "windows": windows, "seed": seed, "gguf": gguf,
        "adapter_dtype": adapter_dtype, "device": device,
    }  # fmt: skip
    with ConsoleProgress() as progress:
        result = library_correct(quantised, original, out, overwrite, progress, run_dir=run_dir, **options)
    print_json(result.record.plain()) if json else _show(result)


def _show(result: Any) -> None:
    headings, rows = result.record.table()
    if rows:
        print_table("over the original", headings, rows)
    print_text(result.record.summary())
    for note in result.record.notes:
        print_text(f"note: {note}")
    print_text(f"written to {result.out}: a LoRA adapter for PEFT, README.md, correction.json")
