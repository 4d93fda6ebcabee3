"""slimrank recover."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from slimrank.cli import options as o
from slimrank.cli.console import ConsoleProgress, print_json, print_table, print_text, say_quietly


def recover(
    model: Annotated[str, typer.Argument(help="Folder of a compressed model.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Folder to write the result to.", show_default=False)],
    teacher: Annotated[
        str | None, typer.Option(help="The original.  \\[default: the one that the folder's report names]")
    ] = None,
    method: Annotated[str, typer.Option(help="Recovery method: see 'slimrank methods'.")] = "distill",
    option: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE of the method or of training; repeatable. See 'slimrank methods METHOD'."),
    ] = None,
    text: Annotated[str, typer.Option(help="Text to train on: as for compress --calibration.")] = "demo",
    chat: Annotated[bool, typer.Option("--chat", help="Train on the answers of chats, by the chat template.")] = False,
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on.  \\[default: one pass]", min=1)] = None,
    eval_text: Annotated[
        list[str] | None, typer.Option(help="Text to measure on, before and after; repeatable.  \\[default: demo]")
    ] = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Measure only the held-out loss.")] = False,
    windows: Annotated[int, typer.Option(help="First windows of each of these.", min=2)] = 16,
    seq_len: Annotated[int | None, typer.Option(help="Tokens a window.  \\[default: 512]", min=2)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of the text, and of adapters.")] = 0,
    run_dir: Annotated[
        Path | None, typer.Option(help="Folder for states of training.  \\[default: OUT.run, removed at the end]")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what slimrank wrote to --out before.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    report_to: Annotated[str, typer.Option(help="Trackers that transformers knows, separated by commas.")] = "",
    max_shard_size: Annotated[str, typer.Option(help="Size of the largest weight file.")] = "5GB",
    json: o.Json = False,
) -> None:
    """Train a compressed model towards its original, at the same ranks and the same size.

    No labels are needed: the loss is the divergence from the original at every token. To resume an interrupted run,
    give the same command again. For many devices: accelerate launch -m slimrank recover ...

    Example: slimrank recover smaller --text my-text.txt --out better
    """
    say_quietly()
    from slimrank.processes import is_leader
    from slimrank.recovery.api import recover as library_recover

    given = o.pairs(option) or {}
    options: dict[str, Any] = {
        "method": method, "options": given if tokens is None else {**given, "tokens": tokens}, "text": text,
        "chat": chat,
        "evaluation": () if no_eval else tuple(eval_text or ["demo"]), "windows": windows,
        "seq_len": seq_len, "seed": seed, "device": device, "dtype": dtype, "max_shard_size": max_shard_size,
        "report_to": tuple(name.strip() for name in report_to.split(",") if name.strip()),
    }  # fmt: skip
    try:
        with ConsoleProgress() if is_leader() else nullcontext() as progress:
            result = library_recover(
                model, teacher, out=out, run_dir=run_dir, overwrite=overwrite, progress=progress, **options
            )
    except KeyboardInterrupt as error:
        typer.secho("\ninterrupted; give the same command again to resume", err=True)
        raise typer.Exit(130) from error
    if is_leader():
        print_json(result.record.plain()) if json else _show(result)


def _show(result: Any) -> None:
    record = result.record
    headings, rows = record.table()
    if rows:
        print_table("over the original", headings, rows)
    for phase in record.phases:
        kept = "" if phase.kept else "; not better, so the weights stayed as they were"
        print_text(
            f"{phase.name}: {phase.tokens:,} tokens in {phase.seconds:,.0f} s, held-out loss {phase.before:.4f} "
            f"before, {phase.after:.4f} after{kept}"
        )
    print_text(f"written to {result.out}: the model, recovery.md, recovery.json")
