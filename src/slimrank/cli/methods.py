"""slimrank methods."""

from __future__ import annotations

import shutil
import textwrap
from itertools import zip_longest
from typing import Annotated, Any

import typer

from slimrank.cli import options as o
from slimrank.cli.console import print_json, print_table, print_text

FLAGS = {"decompose": "--method", "refine": "--refine", "allocate": "--allocation", "recover": "recover --method"}


def methods(
    id: Annotated[
        str | None, typer.Argument(help="A method of any kind: show its options.", show_default=False)
    ] = None,
    json: o.Json = False,
) -> None:
    """List decomposition methods, refiners, allocations, recovery methods: what they need, their cost and source.

    Example: slimrank methods kfac_svd
    """
    listed = _listed()
    if id is not None:
        entries = _find(listed, id)
        if json:
            print_json(entries[0] if len(entries) == 1 else entries)
        else:
            for entry in entries:
                _show(entry)
    elif json:
        print_json(listed)
    else:
        _tables(listed)


def _listed() -> dict[str, list[dict[str, Any]]]:
    from slimrank.methods.allocator import ALLOCATORS
    from slimrank.methods.allocator import NEEDS as ALLOCATION_NEEDS
    from slimrank.methods.decomposer import DECOMPOSERS
    from slimrank.methods.recoverer import RECOVERERS
    from slimrank.methods.refiner import REFINERS
    from slimrank.options import table
    from slimrank.statistics.catalogue import NEEDS

    return {
        "decompose": [
            {
                "id": d.id, "title": d.title, "pass": d.takes, "needs": sorted(d.needs),
                "gathers": [NEEDS[need].title for need in sorted(d.needs)],
                "cost": d.cost, "paper": d.paper, "options": table(d.options),
            }
            for d in DECOMPOSERS.all().values()
        ],
        "refine": [
            {
                "id": r.id, "title": r.title, "pass": "forward", "needs": ["gram"],
                "cost": "two to five passes block by block",
                "paper": r.paper, "options": table(r.options),
            }
            for r in REFINERS.all().values()
        ],
        "allocate": [
            {
                "id": a.id, "title": a.title, "pass": "search" if a.needs - {"spectra"} else "none",
                "needs": sorted(a.needs), "gathers": [ALLOCATION_NEEDS[need] for need in sorted(a.needs)],
                "cost": a.cost, "paper": a.paper, "options": table(a.options),
            }
            for a in ALLOCATORS.all().values()
        ],
        "recover": [
            {
                "id": r.id, "title": r.title, "pass": "training", "needs": [],
                "cost": "three passes forward and one backward over each token",
                "paper": r.paper, "options": table(r.options),
            }
            for r in RECOVERERS.all().values()
        ],
    }  # fmt: skip


def _find(listed: dict[str, list[dict[str, Any]]], id: str) -> list[dict[str, Any]]:
    """Return all entries of that id: a method and an allocation may share one."""
    from slimrank.errors import RecipeError, nearest

    entries = [{"kind": kind, **entry} for kind, some in listed.items() for entry in some]
    found = [entry for entry in entries if entry["id"] == id]
    if not found:
        raise RecipeError(f"there is no method '{id}'.", nearest(id, {entry["id"]: None for entry in entries}))
    return found


def _tables(listed: dict[str, list[dict[str, Any]]]) -> None:
    width = shutil.get_terminal_size((100, 24)).columns
    for kind, option in FLAGS.items():
        print_text(f"\n{option}")
        for entry in listed[kind]:
            needs = f"needs {', '.join(entry['needs'])}" if entry["needs"] else "needs no statistics"
            names = {"none": "no pass over text", "search": "measures the model"}
            passes = names.get(entry["pass"], f"{entry['pass']} pass")
            about = f"{passes}; {needs}; cost: {entry['cost']}"
            lines = [wrapped for text in (entry["title"], about, entry["paper"]) for wrapped in _wrap(text, width)]
            print_text("\n".join(f"{name:16}{line}" for name, line in zip_longest([entry["id"]], lines, fillvalue="")))
    print_text("\nTo see the options of one: slimrank methods ID")


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(40, width - 16), subsequent_indent="  ")


def _show(entry: dict[str, Any]) -> None:
    print_text(f"\n{FLAGS[entry['kind']]} {entry['id']}: {entry['title']}")
    print_text(f"source: {entry['paper']}\npass: {entry['pass']}; cost: {entry['cost']}")
    for gathered in entry.get("gathers", []):
        print_text(f"needs: {gathered}")
    flag = {"decompose": "--option", "refine": "--refine-option", "allocate": "--allocation-option"}.get(
        entry["kind"], "--option"
    )
    rows = [
        (name, str(about["default"]), about["range"], about["description"]) for name, about in entry["options"].items()
    ]
    if rows:
        print_table(f"{flag} NAME=VALUE", ("name", "default", "range", "what it does"), rows)
    else:
        print_text("It has no options.")
