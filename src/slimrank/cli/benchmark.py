"""slimrank benchmark."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from slimrank.cli import options as o
from slimrank.cli.console import ConsoleProgress, print_json, print_table, print_text, say_quietly
from slimrank.errors import RecipeError


def benchmark(
    model: o.Model,
    against: Annotated[str, typer.Option(help="The model to compare with, e.g. the original.", show_default=False)],
    batch: Annotated[str, typer.Option(help="Texts at once; several with commas.")] = "1",
    prompt: Annotated[str, typer.Option(help="Tokens of the prompt; several with commas.")] = "32,512",
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate per round.", min=1)] = 64,
    repeats: Annotated[int, typer.Option(help="Number of rounds; the median is reported.", min=1)] = 5,
    engine: Annotated[
        str, typer.Option(help="transformers, packed, compile, openvino, onnxruntime or vllm: what runs the models.")
    ] = "transformers",
    cache: Annotated[
        str, typer.Option(help="dynamic, latent or latent-int8: what keeps keys and values in transformers.")
    ] = "dynamic",
    busy: Annotated[
        bool, typer.Option("--busy", help="Measure although other processes keep the machine busy.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    json: o.Json = False,
) -> None:
    """Compare speed and size of a model with another, both measured turn by turn in one process.

    Example: slimrank benchmark smaller --against demo --batch 1,8
    """
    from slimrank.evaluate.api import benchmark as library_benchmark
    from slimrank.recipe import Recipe

    Recipe.make({"dtype": dtype, "device": device})
    asked: dict[str, Any] = {"batches": _numbers("--batch", batch), "prompts": _numbers("--prompt", prompt)}
    say_quietly()
    with ConsoleProgress() as progress:
        record = library_benchmark(
            model, against, **asked, new_tokens=new_tokens, repeats=repeats, engine=engine, cache=cache, busy=busy,
            device=device, dtype=dtype, progress=progress,
        )  # fmt: skip
    print_json(record) if json else _show(record, repeats)


def _numbers(flag: str, given: str) -> list[int]:
    """Read whole numbers with commas between them.

    Raises:
        RecipeError: it is something else.
    """
    parts = [part.strip() for part in given.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise RecipeError(f"{flag}: '{given}' is not a list of whole numbers from 1 on.", f"{flag} 1,8,32")
    return [int(part) for part in parts]


def _show(record: dict[str, Any], repeats: int) -> None:
    from slimrank.evaluate.busy import WORTH_SAYING

    ours, theirs = record["model"], record["against"]
    headings = ("batch", "prompt", "", theirs["name"], ours["name"], "ratio", "95 % interval")
    rows = [cells for row in record["rows"] for cells in _speeds(row)]
    print_table("tokens per second", headings, rows)
    print_table("size", ("", theirs["name"], ours["name"], "ratio"), _sizes(record))
    _show_caches(record)
    machine, first = record["machine"], record["rows"][0]
    versions = ", ".join(f"{name} {value}" for name, value in machine.items() if name not in ("processor", "threads"))
    print_text(
        f"{first['new_tokens']} new tokens, medians of {repeats} rounds in turns; {ours['dtype']} and "
        f"{theirs['dtype']} on {record['device']} ({machine['processor']}, {machine['threads']} threads; {versions})"
    )
    if record["others"] > WORTH_SAYING:
        print_text(
            f"other processes kept {record['others']:.1f} processors busy: an idle machine may give other ratios"
        )
    for note in record["notes"]:
        print_text(f"note: {note}")


def _speeds(row: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return two rows, of prefill and decoding."""
    found = []
    for name in ("prefill", "decode"):
        median, low, high = row["ratios"][name]
        speeds = (f"{row[side][name]:,.1f}" for side in ("against", "model"))
        found.append(
            (str(row["batch"]), str(row["prompt"]), name, *speeds, f"x {median:.2f}", f"{low:.2f} to {high:.2f}")
        )
    return found


def _show_caches(record: dict[str, Any]) -> None:
    """Show what caches of one text take, by formula: in fewer bits, too, where nothing here computes it."""
    from slimrank.report.kv_table import kv_headings, kv_rows

    ours, theirs = record["model"], record["against"]
    known = [(side["name"], side["kv_bytes"]) for side in (theirs, ours) if side["kv_bytes"]]
    if known:
        rows = [(name, *cells) for name, found in known for cells in kv_rows(found)]
        print_table("cache of one text, by formula", ("", *kv_headings(known[0][1])), rows)


def _sizes(record: dict[str, Any]) -> list[tuple[str, ...]]:
    ours, theirs, ratios = record["model"], record["against"], record["ratios"]
    rows = [
        ("parameters, M", *(f"{side['parameters'] / 1e6:,.1f}" for side in (theirs, ours)), ratios["parameters"]),
        ("weights, MB", *(f"{side['bytes'] / 1e6:,.1f}" for side in (theirs, ours)), ratios["bytes"]),
    ]
    caches = [(row, *(row[side]["cache_bytes"] for side in ("against", "model"))) for row in record["rows"]]
    for row, before, after in caches:
        if before and after:
            name = f"cache of {row['batch']} x {row['prompt'] + row['new_tokens']} tokens, MB"
            rows.append((name, f"{before / 1e6:,.1f}", f"{after / 1e6:,.1f}", after / before))
    return [(*cells, f"x {ratio:.3f}") for *cells, ratio in rows]
