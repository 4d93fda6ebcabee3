"""slimrank methods."""

from __future__ import annotations

from collections.abc import Mapping

from slimrank.cli import options as o
from slimrank.cli.console import print_json, print_table


def methods(json: o.Json = False) -> None:
    """List the decomposition methods and rank allocations, what they need and where they come from."""
    from slimrank.allocate.registry import ALLOCATORS
    from slimrank.decompose.registry import DECOMPOSERS

    listed = {
        "decompose": [
            {"id": d.id, "title": d.title, "needs": sorted(d.needs), "paper": d.paper}
            for d in DECOMPOSERS.all().values()
        ],
        "allocate": [{"id": a.id, "title": a.title, "needs": [], "paper": a.paper} for a in ALLOCATORS.all().values()],
    }
    if json:
        print_json(listed)
        return
    for option, rows in (("--method", listed["decompose"]), ("--allocation", listed["allocate"])):
        print_table(option, ("id", "what it does", "needs", "source"), [_row(row) for row in rows])


def _row(row: Mapping[str, object]) -> tuple[str, ...]:
    needs = row["needs"]
    shown = ", ".join(map(str, needs)) if isinstance(needs, list) and needs else "nothing"
    return str(row["id"]), str(row["title"]), shown, str(row["paper"])
