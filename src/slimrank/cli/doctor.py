"""slimrank doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slimrank.cli import options as o
from slimrank.cli.console import duration, print_json, print_table, print_text, say_quietly


@o.takes_recipe()
def doctor(
    chosen: dict[str, Any],
    model: Annotated[
        str | None,
        typer.Argument(
            help="Also check whether there is room to compress this model: see compress.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where compress would write.  \\[default: the working folder]")
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Where compress would store spectra.")] = None,
    json: o.Json = False,
) -> None:
    """Check whether this machine can do the work: versions, extras, devices, disks, and room for a model.

    It downloads nothing and loads no weights. Options are those of compress; without a budget, the needs are those of
    the largest one. It exits with 1 if something needed is broken or too small, with 0 if only extras are missing.

    Example: slimrank doctor demo --keep 0.8 --out smaller
    """
    recipe = _recipe(chosen, model)
    from slimrank.doctor import diagnose

    record = diagnose(model, recipe, out, run_dir)
    print_json(record) if json else _show(record)
    raise typer.Exit(0 if record["ok"] else 1)


def _recipe(chosen: dict[str, Any], model: str | None) -> Any:
    """Return the recipe that is meant; None without a model, so that nothing is imported that may be broken.

    Raises:
        RecipeError: options without a model, or wrong ones.
    """
    from slimrank.errors import RecipeError

    if model is None:
        if chosen:
            raise RecipeError(f"the option '{next(iter(chosen))}' needs a MODEL.", "slimrank doctor MODEL --keep 0.8")
        return None
    from slimrank.recipe import BUDGETS, Recipe

    say_quietly()
    return Recipe.make(chosen if set(BUDGETS) & set(chosen) else {**chosen, "keep_ratio": 1.0})


def _show(record: dict[str, Any]) -> None:
    rows = [(p["name"], p["required"] or "any", p["found"] or "missing") for p in record["packages"]]
    print_table(f"slimrank {record['slimrank']}", ("package", "required", "found"), rows)
    extras = [(e["name"], ", ".join(e["missing"]) or "nothing", e["disables"]) for e in record["extras"]]
    print_table("extras", ("extra", "missing", "needed for"), extras)
    print_table("devices", ("device", "memory", "free", "bfloat16"), [_device(row) for row in record["devices"]])
    disks = [(d["what"], d["path"], _bytes(d["free"]), _bytes(d["needed"])) for d in record["disks"]]
    print_table("disks", ("", "where", "free", "needed"), disks)
    if record["model"]:
        _show_needs(record["model"])
    for problem in record["problems"]:
        typer.secho(f"problem: {problem['message']}", fg="red")
        print_text(f"  try: {problem['hint']}")
    if record["ok"]:
        print_text("this machine has everything that is needed")


def _device(row: dict[str, Any]) -> tuple[str, str, str, str]:
    name = f"{row['device']}: {row['name']}"
    if "cores" in row:
        name += f", {row['cores']} cores, {row['threads']} threads"
    return name, _bytes(row["memory"]), _bytes(row["free"]), "yes" if row["bfloat16"] else "no"


def _show_needs(model: dict[str, Any]) -> None:
    from slimrank.report.number_format import millions

    memory = ", ".join(f"about {_bytes(needed)} of {name}" for name, needed in model["memory"].items())
    print_text(f"{model['name']}: {millions(model['parameters'])} parameters, {_bytes(model['bytes_before'])}")
    print_text(f"memory: {memory}\ntime: about {duration(model['seconds'])}")
    for note in model["notes"]:
        print_text(f"note: {note}")


def _bytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count else ""
