"""The record of a run: what was asked, what was done, what came of it."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from slimrank._version import __version__
from slimrank.budget.rank_plan import RankPlan
from slimrank.models.targets import TargetSet, role_of
from slimrank.recipe import Recipe


@dataclass(frozen=True)
class Facts:
    """Everything that the record is made of."""

    model: dict[str, Any]
    recipe: Recipe
    targets: TargetSet
    plan: RankPlan
    errors: dict[str, dict[str, Any]]
    spectra: dict[str, dict[str, list[Any]]]
    notes: list[str]
    before: dict[str, Any]
    after: dict[str, Any]
    seconds: dict[str, float]
    identity: dict[str, Any]
    dtype: str
    device: str
    new_biases: int
    bytes_before: int
    bytes_after: int
    method: dict[str, Any]
    allocation: dict[str, Any]
    corrections: list[dict[str, Any]]
    overlap: str


def build_record(facts: Facts) -> dict[str, Any]:
    """The content of report.json, as reading that gives it back."""
    record = {
        "model": facts.model,
        "size": _size(facts),
        "before": facts.before,
        "after": facts.after,
        "coverage": _coverage(facts.targets),
        "allocation": facts.allocation,
        "corrections": facts.corrections,
        "targets": _targets(facts),
        "spectra": facts.spectra,
        "notes": facts.notes,
        "overlap": facts.overlap,
        "seconds": facts.seconds,
        "provenance": _provenance(facts),
    }
    same: dict[str, Any] = json.loads(json.dumps(record))
    return same


def _size(facts: Facts) -> dict[str, Any]:
    total, dense = facts.targets.coverage.total, facts.plan.dense_parameters
    linears = facts.plan.stored_parameters + facts.new_biases
    after = total - dense + linears
    return {
        "stored_as": facts.plan.stored_as,
        "keep_ratio": linears / dense,
        "keep_total": after / total,
        "removed_ratio": 1 - linears / dense,
        "linears_before": dense,
        "linears_after": linears,
        "parameters_before": total,
        "parameters_after": after,
        "bytes_before": facts.bytes_before,
        "bytes_after": facts.bytes_after,
    }


def _coverage(targets: TargetSet) -> dict[str, Any]:
    coverage = targets.coverage
    return {
        "total": coverage.total,
        "targets": coverage.targets,
        "of_matrices": coverage.of_matrices,
        "left_out": dict(sorted(coverage.left_out.items(), key=lambda item: -item[1])),
    }


def _targets(facts: Facts) -> list[dict[str, Any]]:
    rows = []
    for target in facts.targets:
        planned = facts.plan.targets[target.path]
        rows.append(
            {
                "path": target.path,
                "kind": target.kind,
                "block": target.block,
                "role": role_of(target, facts.targets.blocks_path),
                "shape": list(target.shape),
                "rank": planned.rank,
                "parameters_before": target.parameters,
                "parameters_after": planned.cost(facts.plan.stored_as),
                **facts.errors[target.path],
            }
        )
    return rows


def environment() -> dict[str, Any]:
    """What this process computes with: "slimrank", "python", "versions" (of packages) and "threads"."""
    packages = ("torch", "transformers", "safetensors", "accelerate")
    return {
        "slimrank": __version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def _provenance(facts: Facts) -> dict[str, Any]:
    return {
        **environment(),
        "recipe": facts.recipe.described(),
        "method": facts.method,
        "inputs": facts.identity,
        "dtype": facts.dtype,
        "device": facts.device,
    }
