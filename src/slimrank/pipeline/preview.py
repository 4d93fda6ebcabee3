"""Estimate what a compression does: sizes, ranks, memory, time and what is left out. No weights are loaded."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from slimrank.budget.alternatives import alternatives
from slimrank.budget.rank_plan import RankPlan
from slimrank.models.kv_bytes import kv_bytes, planned_ranks
from slimrank.models.load import skeleton
from slimrank.models.machine import measure_machine
from slimrank.models.structure import short_names, without_numbers
from slimrank.pipeline.forecast import LIBRARIES, Shape, expected_tokens, timetable
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
        "kv_bytes" (of caches of one text, as `models.kv_bytes` counts them; None where it cannot),
        "seconds" (by stage), "peak_memory", "run_bytes" (of the run directory), "notes" (what of the model is left out
        or done otherwise) and "alternatives" (bytes of the linears where all have one form, if forms are chosen) and
        "bits_a_weight" (of a budget in bytes). All but sizes are estimates.

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
    machine = measure_machine(prepared.device, prepared.bfloat16)
    coverage = prepared.targets.coverage
    return {
        "plan": prepared.plan,
        "blocks_path": prepared.targets.blocks_path,
        "size": {**_size(prepared, read.file_bytes), "stored_as": prepared.plan.stored_as},
        "coverage": {**asdict(coverage), "of_matrices": coverage.of_matrices},
        "kinds": _kinds(prepared.plan),
        "kv_bytes": kv_bytes(prepared.model, _latents(prepared.plan)),
        "seconds": {title: cost.seconds(machine) for title, cost in costs.items()},
        "peak_memory": LIBRARIES + shape.parameters * shape.itemsize + max(cost.peak for cost in costs.values()),
        "run_bytes": sum(cost.stored for cost in costs.values()),
        "notes": [*read.notes, *prepared.about_multiple()],
        "alternatives": _alternatives(prepared),
        "quantizes": prepared.recipe.quantizes,
        "bits_a_weight": _bits_a_weight(prepared),
    }


def _latents(plan: RankPlan) -> dict[str, int]:
    """Return the ranks of the latents that a plan leads to, by path."""
    return planned_ranks({path: (plan.form_of(path), target.rank) for path, target in plan.targets.items()})


def _alternatives(prepared: Prepared) -> list[dict[str, Any]]:
    """Return what one form for all targets would take; what it would lose is not known yet."""
    if prepared.problem is None or not prepared.problem.menus:
        return []
    found = alternatives(prepared.problem.menus, dict.fromkeys(prepared.problem.menus, 0.0))
    return [{"form": each.form, "rank": each.rank, "size": each.size} for each in found]


def _bits_a_weight(prepared: Prepared) -> float | None:
    """Return what a budget in bytes leaves for each weight of the targets; None for another budget."""
    if prepared.problem is None or prepared.recipe.max_bytes is None:
        return None
    return prepared.problem.budget / prepared.targets.coverage.targets


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
        "linears_bytes": size.linears(plan),
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
