"""Make the record of a run from its state."""

from __future__ import annotations

import json
from typing import Any

from slimrank.layers.transforms import Transform, found_transforms
from slimrank.models.kv_bytes import kv_bytes
from slimrank.models.storage import saved_bytes
from slimrank.pipeline.state import State
from slimrank.report.build import Facts, build_record
from slimrank.report.section import Section


def record_of(state: State) -> dict[str, Any]:
    """Return the content of report.json; the same object every time."""
    if state.results.record is None:
        state.results.record = build_record(_facts(state))
    return state.results.record


def _facts(state: State) -> Facts:
    prepared, inputs, results = state.prepared, state.inputs, state.results
    return Facts(
        model={**inputs.origin, "class": type(state.model).__name__},
        recipe=prepared.recipe, targets=prepared.targets, plan=state.plan, errors=results.rows,
        spectra=results.spectra, notes=state.notes, before=results.before, after=results.after,
        seconds=state.seconds, identity=inputs.identity(), new_biases=results.new_biases,
        bytes_before=inputs.file_bytes or prepared.size.total, bytes_after=saved_bytes(state.model),
        linears_bytes=prepared.size.linears(state.plan),
        dtype=str(prepared.dtype).removeprefix("torch."), device=str(prepared.device),
        method=prepared.choices.method.described(), allocation=results.allocation, corrections=results.corrections,
        overlap=inputs.texts.overlap, sections=[*results.sections, *_transforms(state.model)],
        kv_bytes=kv_bytes(state.model),
    )  # fmt: skip


def _transforms(model: Any) -> list[Section]:
    """Return a section about the model transforms that slimrank does not bring itself, if there are any."""
    rows = [(found.kind, json.dumps(entry)) for found, entry in found_transforms(model) if _foreign(found)]
    about = {"stage": "save", "title": "Model transforms", "columns": ("kind", "entry")}
    return [Section.model_validate({**about, "rows": rows})] if rows else []


def _foreign(transform: Transform) -> bool:
    return not type(transform).__module__.startswith("slimrank.")
