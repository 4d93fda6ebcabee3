"""slimrank evaluate."""

from __future__ import annotations

from typing import Annotated

import typer

from slimrank.cli import options as o
from slimrank.cli.console import ConsoleProgress, one_line, print_json, print_table, print_text, say_quietly


def evaluate(
    model: o.Model,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to measure perplexity on (as for compress --calibration); repeatable.  \\[default: demo]"
        ),
    ] = None,
    windows: Annotated[int | None, typer.Option(help="First windows of each text.  \\[default: all]", min=1)] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens per window; seq-len - 1 of them are predicted.  \\[default: 512]", min=2),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    json: o.Json = False,
) -> None:
    """Measure a model, compressed or not: perplexity, tokens per second, memory, a sample of its text.

    Example: slimrank evaluate smaller --text wiki.txt --windows 40
    """
    from slimrank.evaluation import evaluate as library_evaluate
    from slimrank.recipe import Recipe

    Recipe.make({"dtype": dtype, "device": device})
    say_quietly()
    with ConsoleProgress() as progress:
        record = library_evaluate(model, text or ["demo"], windows, seq_len, device, dtype, progress)
    if json:
        print_json(record)
        return
    rows = [
        (name, f"{m['perplexity']:.3f}", str(m["windows"]), str(m["seq_len"]), f"{m['tokens']:,}")
        for name, m in record["texts"].items()
    ]
    print_table("", ("text", "perplexity", "windows", "seq-len", "predictions"), rows)
    speed = record["speed"]
    print_text(
        f"speed: prefill {speed['prefill']:.0f} tokens/s, decode {speed['decode']:.1f} tokens/s "
        f"({record['device']}, {record['dtype']})"
    )
    print_text(f"peak memory of this process: {record['peak_memory'] / 1e9:.2f} GB")
    print_text(f"{one_line(record['sample']['prompt'])} ... {one_line(record['sample']['text'])}")
