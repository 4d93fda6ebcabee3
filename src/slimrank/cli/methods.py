"""slimrank methods."""

from __future__ import annotations

import shutil
import textwrap
from itertools import zip_longest
from typing import Annotated, Any

import typer

from slimrank.cli import options as o
from slimrank.cli.console import print_json, print_table, print_text


def methods(
    id: Annotated[str | None, typer.Argument(help="One of them, to see its options.", show_default=False)] = None,
    json: o.Json = False,
) -> None:
    """List decomposition methods, refiners and rank allocations: what they need, cost, and where they come from.

    Example: slimrank methods kfac_svd
    """
    listed = _listed()
    if id is not None:
        entry = _find(listed, id)
        print_json(entry) if json else _show(entry)
    elif json:
        print_json(listed)
    else:
        _tables(listed)


def _listed() -> dict[str, list[dict[str, Any]]]:
    from slimrank.allocate.registry import ALLOCATORS
    from slimrank.decompose.registry import DECOMPOSERS
    from slimrank.options import table
    from slimrank.refine.registry import REFINERS
    from slimrank.statistics.needs import NEEDS

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
                "cost": "two or three passes block by block",
                "paper": r.paper, "options": table(r.options),
            }
            for r in REFINERS.all().values()
        ],
        "allocate": [
            {"id": a.id, "title": a.title, "pass": "none", "needs": [], "cost": "none", "paper": a.paper, "options": {}}
            for a in ALLOCATORS.all().values()
        ],
    }  # fmt: skip


def _find(listed: dict[str, list[dict[str, Any]]], id: str) -> dict[str, Any]:
    from slimrank.errors import RecipeError, nearest

    known = {entry["id"]: {"kind": kind, **entry} for kind, entries in listed.items() for entry in entries}
    if id not in known:
        raise RecipeError(f"there is no method '{id}'.", nearest(id, known))
    return known[id]


def _tables(listed: dict[str, list[dict[str, Any]]]) -> None:
    width = shutil.get_terminal_size((100, 24)).columns
    for kind, option in (("decompose", "--method"), ("refine", "--refine"), ("allocate", "--allocation")):
        print_text(f"\n{option}")
        for entry in listed[kind]:
            needs = f"needs {', '.join(entry['needs'])}" if entry["needs"] else "needs no statistics"
            passes = "no pass over text" if entry["pass"] == "none" else f"{entry['pass']} pass"
            about = f"{passes}; {needs}; cost: {entry['cost']}"
            lines = [wrapped for text in (entry["title"], about, entry["paper"]) for wrapped in _wrap(text, width)]
            print_text("\n".join(f"{name:16}{line}" for name, line in zip_longest([entry["id"]], lines, fillvalue="")))
    print_text("\nOptions of one: slimrank methods ID")


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(40, width - 16), subsequent_indent="  ")


def _show(entry: dict[str, Any]) -> None:
    print_text(
        f"{entry['id']}: {entry['title']}\nsource: {entry['paper']}\npass: {entry['pass']}; cost: {entry['cost']}"
    )
    for gathered in entry.get("gathers", []):
        print_text(f"needs: {gathered}")
    flag = {"decompose": "--option", "refine": "--refine-option"}.get(entry["kind"])
    rows = [
        (name, str(about["default"]), about["range"], about["description"]) for name, about in entry["options"].items()
    ]
    if rows:
        print_table(f"{flag} NAME=VALUE", ("name", "default", "range", "what it does"), rows)
    else:
        print_text("It has no options.")
