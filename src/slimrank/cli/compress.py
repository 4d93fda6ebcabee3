"""slimrank compress."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from slimrank.cli import options as o
from slimrank.cli import push as hub
from slimrank.cli.console import ConsoleProgress, one_line, print_json, print_table, print_text, say_quietly
from slimrank.processes import is_leader
from slimrank.progress import Progress


@o.takes_recipe()
def compress(
    model: o.Model,
    chosen: dict[str, Any],
    out: Annotated[Path, typer.Option("--out", help="Folder to write the compressed model to.", show_default=False)],
    run_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for statistics and spectra. Keep it to compress at another budget without calibrating.  "
            "\\[default: OUT.run, removed at the end]"
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what slimrank wrote to --out before.")
    ] = False,
    push_to_hub: hub.ToHub = None,
    private: hub.Private = False,
    revision: hub.Revision = None,
    create_pr: hub.CreatePr = False,
    json: o.Json = False,
) -> None:
    """Compress a model and write it to a folder, with a report.

    The folder loads with AutoModelForCausalLM.from_pretrained, after `import slimrank` or with trust_remote_code=True.
    To resume an interrupted run, give the same command again. Several processes share the work:
    torchrun --nproc-per-node 2 -m slimrank compress ...

    Example: slimrank compress demo --keep 0.8 --calibration my-text.txt --out smaller
    """
    where = hub.destination(model, push_to_hub, private, revision, create_pr)
    report = run_compress(model, out, chosen, run_dir, overwrite)
    if not is_leader():
        return
    address = where and _push(out, where)
    if json:
        print_json({**report, "pushed": address} if address else report)
        return
    show_report(report, out)
    if address:
        print_text(f"uploaded: {address}")


def _push(out: Path, where: Any) -> str:
    """Upload the result.

    Raises:
        SlimrankError: it failed; the result lies in its folder, which the hint says.
    """
    from dataclasses import asdict

    from slimrank.errors import SlimrankError
    from slimrank.hub.pushing import push

    try:
        return push(out, **asdict(where))
    except SlimrankError as error:
        error.hint = f"{error.hint}; the model is in '{out}': slimrank push '{out}' {where.repo}"
        raise


def run_compress(
    model: str, out: Path, chosen: dict[str, Any], run_dir: Path | None, overwrite: bool
) -> dict[str, Any]:
    """Compress with progress on the screen and return the report."""
    from slimrank.pipeline import compress as library_compress
    from slimrank.recipe import Recipe

    made = Recipe.make(chosen)
    made.need_budget()
    say_quietly()
    try:
        with ConsoleProgress() if is_leader() else nullcontext(Progress()) as progress:
            result = library_compress(
                model, recipe=made, out=out, run_dir=run_dir, overwrite=overwrite, progress=progress
            )
    except KeyboardInterrupt as error:
        typer.secho("\ninterrupted; give the same command again to resume", err=True)
        raise typer.Exit(130) from error
    return result.report


def show_report(report: dict[str, Any], out: Path) -> None:
    """Show the headline of a report, and where the rest is."""
    from slimrank.report.number_format import percent
    from slimrank.report.tables import comparison

    size = report["size"]
    kept = f"kept {percent(size['keep_ratio'])} of the linears, {percent(size['keep_total'])} of the model"
    print_table(kept, ("", "before", "after", "ratio"), comparison(report))
    if report["before"]:
        print_text(f"\n{one_line(report['before']['sample']['prompt'])} ...")
        for name in ("before", "after"):
            print_text(f"  {name}: {one_line(report[name]['sample']['text'])}")
    for section in report["sections"]:
        print_table(section["title"], tuple(section["columns"]), section["rows"])
        print_text(section["note"])
    if report["overlap"]:
        print_text(f"\nwarning: {report['overlap']}")
    asked = report["provenance"]["recipe"]
    if report["before"] and asked["evaluation"] == "demo" and asked["calibration"] != "demo":
        print_text("\nperplexity was measured on Python's documentation, not on text like yours: give --eval-text FILE")
    if report["notes"]:
        print_text(f"\nskipped, clamped or unusual: {len(report['notes'])} notes in report.html")
    print_text(f"\nwritten to {out}: the model, report.html (also as .md and .json), README.md, plan.json")
