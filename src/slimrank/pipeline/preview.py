"""What a compression would do: sizes, ranks, memory, time and what is left out. No weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slimrank.budget.rank_plan import RankPlan
from slimrank.evaluate.perplexity import LOGITS_AT_ONCE
from slimrank.layers.forms import layer_form
from slimrank.methods.allocator import ALLOCATORS, ConfiguredAllocator
from slimrank.methods.decomposer import DECOMPOSERS
from slimrank.models.fused_layers import take_apart
from slimrank.models.load import skeleton
from slimrank.models.placement import resolve_device
from slimrank.models.storage import stored_dtype
from slimrank.models.structure import short_names, without_numbers
from slimrank.models.targets import TargetSet, find_targets
from slimrank.pipeline.forecast import measure_machine, peak_bytes, run_bytes, stage_seconds
from slimrank.pipeline.model_bytes import ModelBytes, new_biases
from slimrank.pipeline.planning import (
    Unit,
    at_first,
    check_corrections,
    configured_refiner,
    following_plan,
    given_plan,
    make_problem,
    plan_of,
    reads_text,
    units_of,
    workload,
)
from slimrank.progress import Progress
from slimrank.recipe import Recipe
from slimrank.text.texts import window_length


def preview(
    model: str | Path, recipe: Recipe | None = None, progress: Progress | None = None, **options: Any
) -> dict[str, Any]:
    """What `compress` would do with the same arguments.

    Returns:
        A record with "plan" (as `RankPlan`), "blocks_path", "size", "coverage", "kinds" (one row for each layer name),
        "seconds" (by stage), "peak_memory", "run_bytes" (of the run directory) and "notes" (what of the model is left
        out or done otherwise). All but sizes are estimates.

    Raises:
        SlimrankError: whatever `compress` would refuse for the same model and budget.
    """
    made = following_plan(Recipe.merged(recipe, options))
    device = resolve_device(made.device)
    read = skeleton(model, made.dtype, progress)
    bones = read.model
    take_apart(bones, made.split)
    seq_len = window_length(bones, made.seq_len)
    targets = find_targets(bones, made.targets, made.ignore, layer_form(made.factor_form))
    coverage = targets.coverage
    size = ModelBytes.of(bones, targets)
    method = DECOMPOSERS.get(made.method).configured(made.method_options)
    refiner = configured_refiner(made, method)
    check_corrections(made, method)
    allocator = ALLOCATORS.get(made.allocation).configured(made.allocation_options)
    plan = _plan(made, bones, targets, units_of(method, targets, made.stored_as), size, allocator)
    work = workload(
        made,
        bones,
        targets,
        method,
        calibration_tokens=made.samples * seq_len if reads_text(made, method) else 0,
        refined_tokens=made.samples * seq_len * (refiner.following.samples_factor if refiner else 0),
        evaluation_tokens=made.windows * seq_len if made.evaluation else 0,
        seq_len=seq_len,
    )
    logits = max(LOGITS_AT_ONCE, seq_len * bones.config.get_text_config().vocab_size)
    return {
        "plan": plan,
        "blocks_path": targets.blocks_path,
        "size": {**_size(made, plan, targets, size, read.file_bytes), "stored_as": plan.stored_as},
        "coverage": {**asdict(coverage), "of_matrices": coverage.of_matrices},
        "kinds": _kinds(plan),
        "seconds": stage_seconds(work, measure_machine(device)),
        "peak_memory": peak_bytes(work, logits, stored_dtype(bones).itemsize, upcast=device.type == "cpu"),
        "run_bytes": run_bytes(work, plan.stored_parameters, resumable=True),
        "notes": read.notes,
    }


def _size(
    recipe: Recipe, plan: RankPlan, targets: TargetSet, size: ModelBytes, file_bytes: int | None
) -> dict[str, Any]:
    """Count before and after: of the linears, and of the whole model."""
    coverage = targets.coverage
    factored = [t for t in targets if plan.targets[t.path].rank != "dense"]
    linears = plan.stored_parameters + new_biases(recipe, (t for t in factored if not t.bias))
    after = coverage.total - coverage.targets + linears
    return {
        "keep_ratio": linears / coverage.targets,
        "keep_total": after / coverage.total,
        "parameters_before": coverage.total,
        "parameters_after": after,
        "bytes_before": file_bytes or size.total,
        "bytes_loaded": size.total,
        "bytes_after": size.compressed(recipe, plan, targets),
    }


def _plan(
    recipe: Recipe,
    model: Any,
    targets: TargetSet,
    units: Sequence[Unit],
    size: ModelBytes,
    allocator: ConfiguredAllocator,
) -> RankPlan:
    plan = given_plan(recipe, targets, units)
    if plan is not None:
        return plan
    problem = make_problem(recipe, model, targets, units, size)
    return plan_of(at_first(problem, allocator), recipe, problem, targets, units)


def _kinds(plan: RankPlan) -> list[dict[str, Any]]:
    """One row per layer name and shape: how many, and the range of their ranks."""
    rows: dict[tuple[str, tuple[int, int]], dict[str, Any]] = {}
    names = short_names(list(dict.fromkeys(map(without_numbers, plan.targets))))
    for path, target in plan.targets.items():
        name = names[without_numbers(path)]
        row = rows.setdefault(
            (name, target.shape),
            {"name": name, "shape": list(target.shape), "count": 0, "ranks": [], "parameters": 0},
        )
        row["count"] += 1
        row["parameters"] += target.cost(plan.stored_as)
        if target.rank not in row["ranks"]:
            row["ranks"].append(target.rank)
    return list(rows.values())
