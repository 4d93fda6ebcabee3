"""slimrank export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slimrank.cli import options as o
from slimrank.cli.console import ConsoleProgress, print_json, print_table, print_text, say_quietly


def export(
    model: o.Model,
    out: Annotated[Path, typer.Option("--out", help="Folder to write the result to.", show_default=False)],
    to: Annotated[str, typer.Option(help="The engine: openvino, onnx or gguf (llama.cpp).")] = "openvino",
    weights: Annotated[
        str | None,
        typer.Option(help="float32, float16, int8 or int4.  \\[default: float32 for a model of float32, else float16]"),
    ] = None,
    packed: Annotated[
        bool,
        typer.Option(
            "--packed",
            help="Pairs for pivot layers, one product for layers of the same inputs: faster if narrow.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what slimrank wrote to --out before.")
    ] = False,
    json: o.Json = False,
) -> None:
    """Write a model, compressed or not, for another engine: OpenVINO, ONNX Runtime or llama.cpp.

    Its logits are compared with those of transformers before it is written.

    Example: slimrank export smaller --to openvino --weights int8 --out smaller-openvino
    """
    say_quietly()
    from slimrank.exporting.api import export as library_export

    try:
        with ConsoleProgress() as progress:
            record = library_export(
                model, out, to, weights=weights, packed=packed, overwrite=overwrite, progress=progress
            )
    except KeyboardInterrupt as error:
        typer.secho("\ninterrupted; nothing was written", err=True)
        raise typer.Exit(130) from error
    print_json(record.plain()) if json else _show(record, out)


def _show(record: Any, out: Path) -> None:
    from slimrank.exporting.target import TARGETS

    total = sum(record.numbers.values())
    rows = [(kind, f"{count / 1e6:,.1f} M", f"{100 * count / total:.1f} %") for kind, count in record.numbers.items()]
    print_table("", ("weights", "numbers", "share"), rows)
    differences = record.difference
    print_text(
        f"logits differ from those of transformers by {differences['graph']:.1g} of the largest one, with the weights "
        f"in the file by {differences['written']:.1g}"
    )
    for note in record.notes:
        print_text(f"note: {note}")
    engine = f"{TARGETS.get(record.engine).title} {record.engine_version}"
    print_text(f"written to {out}: {record.bytes / 1e6:,.1f} MB, for {engine}")
