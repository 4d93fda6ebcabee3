"""Estimate what a compression does: sizes, ranks, memory, time and what is left out. No weights are loaded."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from slimrank.budget.rank_plan import RankPlan
from slimrank.models.load import skeleton
from slimrank.models.structure import short_names, without_numbers
from slimrank.pipeline.forecast import LIBRARIES, Shape, expected_tokens, measure_machine, timetable
from slimrank.pipeline.model_bytes import new_biases
from slimrank.pipeline.prepare import Choices, Prepared
from slimrank.pipeline.stages.save import Save
from slimrank.progress import Progress
from slimrank.recipe import Recipe
from slimrank.text.texts import merged


def preview(
    model: str | Path, recipe: Recipe | None = None, progress: Progress | None = None, **options: Any
) -> dict[str, Any]:
    """Estimate what `compress` would do with the same arguments.

    Returns:
        A record with "plan" (as `RankPlan`), "blocks_path", "size", "coverage", "kinds" (one row for each layer name),
        "seconds" (by stage), "peak_memory", "run_bytes" (of the run directory) and "notes" (what of the model is left
        out or done otherwise). All but sizes are estimates.

    Raises:
        SlimrankError: whatever `compress` would refuse for the same model and budget.
    """
    choices = Choices.of(Recipe.merged(recipe, options))
    stages = [*choices.stages, Save(None)]
    read = skeleton(model, choices.recipe.dtype, progress)
    prepared = Prepared.of(choices, read.model)
    requests = merged(request for stage in stages for request in stage.windows(choices))
    shape = Shape.of(prepared, expected_tokens(requests, prepared.recipe.seq_len or 0))
    costs = timetable(stages, prepared, shape)
    machine = measure_machine(prepared.device)
    coverage = prepared.targets.coverage
    return {
        "plan": prepared.plan,
        "blocks_path": prepared.targets.blocks_path,
        "size": {**_size(prepared, read.file_bytes), "stored_as": prepared.plan.stored_as},
        "coverage": {**asdict(coverage), "of_matrices": coverage.of_matrices},
        "kinds": _kinds(prepared.plan),
        "seconds": {title: cost.seconds(machine) for title, cost in costs.items()},
        "peak_memory": LIBRARIES + shape.parameters * shape.itemsize + max(cost.peak for cost in costs.values()),
        "run_bytes": sum(cost.stored for cost in costs.values()),
        "notes": read.notes,
    }


def _size(prepared: Prepared, file_bytes: int | None) -> dict[str, Any]:
    """Count before and after: of the linears, and of the whole model."""
    plan, targets, size, coverage = prepared.plan, prepared.targets, prepared.size, prepared.targets.coverage
    factored = [t for t in targets if plan.targets[t.path].rank != "dense"]
    linears = plan.stored_parameters + new_biases(prepared.recipe, (t for t in factored if not t.bias))
    after = coverage.total - coverage.targets + linears
    return {
        "keep_ratio": linears / coverage.targets,
        "keep_total": after / coverage.total,
        "parameters_before": coverage.total,
        "parameters_after": after,
        "bytes_before": file_bytes or size.total,
        "bytes_loaded": size.total,
        "bytes_after": size.compressed(prepared.recipe, plan, targets),
    }


def _kinds(plan: RankPlan) -> list[dict[str, Any]]:
    """Return a row for each layer name and shape: how many there are, their ranks and their own forms."""
    rows: dict[tuple[str, tuple[int, int]], dict[str, Any]] = {}
    names = short_names(list(dict.fromkeys(map(without_numbers, plan.targets))))
    for path, target in plan.targets.items():
        name = names[without_numbers(path)]
        row = rows.setdefault(
            (name, target.shape),
            {"name": name, "shape": list(target.shape), "count": 0, "ranks": [], "parameters": 0, "forms": {}},
        )
        if target.form:
            row["forms"][target.form] = row["forms"].get(target.form, 0) + 1
        row["count"] += 1
        row["parameters"] += target.cost(plan.stored_as)
        if target.rank not in row["ranks"]:
            row["ranks"].append(target.rank)
    return list(rows.values())
