"""Build the record of a run out of what the pipeline knows."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch

from slimrank._version import __version__
from slimrank.budget.rank_plan import RankPlan
from slimrank.models.targets import Target, TargetSet, role_of
from slimrank.recipe import Recipe
from slimrank.report.record import RECORD_VERSION, RunRecord
from slimrank.report.section import Section

PACKAGES = ("torch", "transformers", "safetensors", "accelerate")


@dataclass(frozen=True)
class Facts:
    """Everything that a record is made of.

    Attributes:
        model: where the model comes from, and its class.
        recipe: what was asked.
        targets: the weights that were compressed.
        plan: their ranks.
        errors: target -> its errors and its group.
        spectra: path -> ranks and relative errors.
        notes: what was skipped, clamped or unusual.
        before: measurements of the original model; empty without an evaluation text.
        after: the same of the compressed model.
        seconds: stage -> seconds.
        identity: digests of the inputs.
        dtype: of the model.
        device: that computed.
        new_biases: parameters of biases that the original model does not have.
        bytes_before: of the weights.
        bytes_after: of the compressed weights.
        linears_bytes: of what the targets store.
        method: the decomposition method with its options.
        allocation: what the allocator reports.
        corrections: rounds of correction.
        overlap: a warning if calibration text contains evaluation windows; else empty.
        sections: what other stages report.
        kv_bytes: of caches of keys and values: see `models.kv_bytes`; None where they are not known.
    """

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
    linears_bytes: int
    method: dict[str, Any]
    allocation: dict[str, Any]
    corrections: list[dict[str, Any]]
    overlap: str
    sections: Sequence[Section] = field(default_factory=list)
    kv_bytes: Mapping[str, Mapping[int, int]] | None = None


def build_record(facts: Facts) -> dict[str, Any]:
    """Return the content of report.json, as reading the file gives it back.

    Raises:
        ValidationError: a stage or a method reports something that the record has no place for.
    """
    return run_record(facts).content()


def run_record(facts: Facts) -> RunRecord:
    """Return the same, typed."""
    return RunRecord.model_validate({
        "model": facts.model,
        "size": _size(facts),
        "kv_bytes": {
            name: {str(tokens): size for tokens, size in sizes.items()}
            for name, sizes in (facts.kv_bytes or {}).items()
        },
        "before": facts.before,
        "after": facts.after,
        "coverage": _coverage(facts.targets),
        "allocation": facts.allocation,
        "corrections": facts.corrections,
        "targets": [_row(target, facts) for target in facts.targets],
        "spectra": facts.spectra,
        "notes": facts.notes,
        "overlap": facts.overlap,
        "seconds": facts.seconds,
        "provenance": _provenance(facts),
        "sections": [section.model_dump() for section in facts.sections],
        "record_version": RECORD_VERSION,
    })  # fmt: skip


def environment() -> dict[str, Any]:
    """Return what this process computes with: "slimrank", "python", "versions" (of packages) and "threads"."""
    return {
        "slimrank": __version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


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
        "linears_bytes": facts.linears_bytes,
    }


def _coverage(targets: TargetSet) -> dict[str, Any]:
    coverage = targets.coverage
    return {
        "total": coverage.total,
        "targets": coverage.targets,
        "of_matrices": coverage.of_matrices,
        "left_out": dict(sorted(coverage.left_out.items(), key=lambda item: -item[1])),
    }


def _row(target: Target, facts: Facts) -> dict[str, Any]:
    planned = facts.plan.targets[target.path]
    return {
        "path": target.path,
        "kind": target.kind,
        "block": target.block,
        "role": role_of(target, facts.targets.blocks_path),
        "shape": list(target.shape),
        "rank": planned.rank,
        "parameters_before": target.parameters,
        "parameters_after": planned.cost(facts.plan.stored_as),
        **({"form": planned.form} if planned.form else {}),
        **facts.errors[target.path],
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
