"""Show a rank plan as a heat map of blocks and layers, and the curve of error against size."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from slimrank.cli.console import plain_console

if TYPE_CHECKING:
    from slimrank.budget.rank_plan import PlannedTarget, RankPlan

BAR = 40  # characters
TINY = 1e-9  # of the largest error: rounding


def show_plan(plan: RankPlan, blocks_path: str) -> None:
    """Show the percent of its parameters that each layer keeps: a row per block, a column per kind of layer."""
    from slimrank.models.structure import short_names, without_numbers

    cells: dict[int, dict[str, list[PlannedTarget]]] = {}
    for path, target in plan.targets.items():
        found = re.match(re.escape(blocks_path) + r"\.(\d+)\.?(.*)", path)
        block, inside = (int(found[1]), found[2]) if found else (0, path)
        cells.setdefault(block, {}).setdefault(without_numbers(inside), []).append(target)
    roles = list(dict.fromkeys(role for row in cells.values() for role in row))
    table = Table(title="percent kept, by block and layer (-- is dense)", title_justify="left", pad_edge=False)
    for heading in ("block", *short_names(roles).values()):
        table.add_column(heading, justify="right")
    for block, row in sorted(cells.items()):
        table.add_row(str(block), *(_cell(row.get(role, []), plan.stored_as) for role in roles))
    plain_console().print(table)


def _cell(targets: list[PlannedTarget], form: str) -> Text:
    if not targets:
        return Text("")
    kept = sum(t.cost(form) for t in targets) / sum(t.shape[0] * t.shape[1] for t in targets)
    if all(t.rank == "dense" for t in targets):
        return Text("--", style="on color(22)")
    shade = 232 + round(23 * (1 - min(1.0, kept)))
    style = f"{'white' if shade < 244 else 'black'} on color({shade})"
    return Text(f"{100 * kept:.0f}", style=style)


def show_trade_off(allocation: dict[str, Any], keep_ratio: float) -> None:
    """Show the predicted error at several sizes, and of the plan itself, as bars of its logarithm."""
    from math import log10

    from slimrank.cli.console import print_text

    points = allocation.get("trade_off", [])
    points = [p for p in points if p["error"] > TINY * points[0]["error"]]
    if len(points) < 2:
        print_text("\nthe predicted error of this plan is zero")
        return
    points.append({"keep_ratio": keep_ratio, "error": max(allocation["predicted"], points[-1]["error"]), "mark": True})
    points.sort(key=lambda point: point["keep_ratio"])
    logs = [log10(p["error"]) for p in points]
    span = max(logs) - min(logs) or 1.0
    print_text(
        "\npredicted error (sum over layers, logarithmic) against the fraction of the linears' parameters that is kept"
    )
    for point, value in zip(points, logs, strict=True):
        bar = "#" * max(1, round(BAR * (value - min(logs)) / span))
        print_text(f"{point['keep_ratio']:5.2f}  {point['error']:10.4g}  {bar}{' <- this plan' * ('mark' in point)}")
    if allocation.get("gap") is not None:
        gap = f"{100 * allocation['gap']:.3f} %"
        print_text(f"judged by predicted errors, no allowed plan is better by more than {gap}")
    if allocation.get("additivity", {}).get("spearman") is not None:
        print_text(f"rank correlation of predicted and measured divergence: {allocation['additivity']['spearman']:.2f}")
