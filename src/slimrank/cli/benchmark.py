"""slimrank benchmark."""

from __future__ import annotations

from typing import Annotated

import typer

from slimrank.cli import options as o
from slimrank.cli.console import ConsoleProgress, print_json, print_table, print_text, say_quietly


def benchmark(
    model: o.Model,
    against: Annotated[str, typer.Option(help="The model to compare with, e.g. the original.", show_default=False)],
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.", min=1)] = 256,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate per round.", min=1)] = 32,
    repeats: Annotated[int, typer.Option(help="Number of rounds; the median is reported.", min=1)] = 5,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    json: o.Json = False,
) -> None:
    """Compare speed and size of a model with another, both measured turn by turn in one process.

    Example: slimrank benchmark smaller --against demo
    """
    from slimrank.evaluate.api import benchmark as library_benchmark
    from slimrank.recipe import Recipe

    Recipe.make({"dtype": dtype, "device": device})
    say_quietly()
    with ConsoleProgress() as progress:
        record = library_benchmark(
            model, against, prompt, new_tokens, repeats, device=device, dtype=dtype, progress=progress
        )
    if json:
        print_json(record)
        return
    ours, theirs, ratios = record["model"], record["against"], record["ratios"]
    rows = [
        (
            "prefill, tokens/s",
            f"{theirs['prefill']:.0f}",
            f"{ours['prefill']:.0f}",
            f"x {ratios['prefill']:.2f}",
        ),
        ("decode, tokens/s", f"{theirs['decode']:.1f}", f"{ours['decode']:.1f}", f"x {ratios['decode']:.2f}"),
        (
            "parameters",
            f"{theirs['parameters'] / 1e6:,.1f} M",
            f"{ours['parameters'] / 1e6:,.1f} M",
            f"x {ratios['parameters']:.3f}",
        ),
        (
            "weights in memory",
            f"{theirs['bytes'] / 1e6:,.1f} MB",
            f"{ours['bytes'] / 1e6:,.1f} MB",
            f"x {ratios['bytes']:.3f}",
        ),
    ]
    print_table("", ("", against, model, "ratio"), rows)
    print_text(
        f"batch 1, {ours['prompt']} + {ours['new_tokens']} tokens, median of {repeats} rounds, "
        f"{ours['dtype']} on {record['device']}"
    )
    if ratios["decode"] < 1:
        print_text("slower than the model it is compared with: low-rank layers pay on wide layers and low ranks")
