"""Whether this machine can do the work: versions, extras, devices, and room for a model. Uses no network.

Packages may be missing or broken here, so nothing of torch or transformers is imported before it was looked at.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement

from slimrank._version import __version__
from slimrank.errors import ModelError, SlimrankError

if TYPE_CHECKING:
    import torch

    from slimrank.recipe import Recipe

DISABLES = {
    "data": "text from parquet files and from data sets of the hub",
    "demo": "the demo model, and models in GGUF files",
    "dev": "testing slimrank itself",
    "docs": "building the documentation",
    "eval": "tasks of lm-evaluation-harness (evaluate --tasks)",
    "report": "plots in report.html",
}
IMPORTED = ("torch", "transformers")
LESS_MEMORY = "a machine with more memory, --dtype bfloat16, a smaller --batch-size or --samples, or no --resident"

Problems = list[SlimrankError]


def diagnose(
    model: str | Path | None = None,
    recipe: Recipe | None = None,
    out: str | Path | None = None,
    run_dir: str | Path | None = None,
) -> dict[str, Any]:
    """What there is, and what is wrong with it.

    Args:
        model: also say whether there is memory and disk to compress this one. It has to be on this machine.
        recipe: how it is to be compressed, with a budget. By default as `compress` does it, everything kept: the most
            that any budget takes.
        out: where the compressed model would go; the working folder by default.
        run_dir: where the run directory would be; beside `out` by default.

    Returns:
        A record with "slimrank" (version), "packages", "extras", "devices", "disks", "model" (None, or what it needs;
        bytes and seconds are estimates), "problems" (each with "message" and "hint") and "ok". Missing extras are
        no problem.
    """
    problems: Problems = []
    packages, extras = _distributions(problems)
    works = [_imports(name, problems) for name in IMPORTED]
    found = devices() if works[0] else []
    place = Path(out) if out is not None else Path.cwd()
    beside = Path(run_dir) if run_dir is not None else place.with_name(place.name + ".run") if out else place
    needs = {"output": (place, 0), "run directory": (beside, 0), **_caches()}
    about = None
    if model is not None and all(works):
        try:
            about = _needs(model, recipe, found, needs, problems)
        except SlimrankError as error:
            problems.append(error)
    return {
        "slimrank": __version__,
        "packages": packages,
        "extras": extras,
        "devices": found,
        "disks": disks(needs, problems),
        "model": about,
        "problems": [{"message": p.message, "hint": p.hint} for p in problems],
        "ok": not problems,
    }


# packages -------------------------------------------------------------------------------------------------------


def _distributions(problems: Problems) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Needed packages and extras, as slimrank's own metadata states them."""
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
        problems.append(SlimrankError(message, "an environment of another Python"))
    return [python, *packages], [_extra(name, wanted) for name in about.get_all("Provides-Extra") or []]


def _package(requirement: Requirement, found: str | None) -> dict[str, Any]:
    fits = found is not None and requirement.specifier.contains(found, prereleases=True)
    return {"name": requirement.name, "required": str(requirement.specifier), "found": found, "ok": fits}


def _extra(name: str, wanted: list[Requirement]) -> dict[str, Any]:
    """An extra, and which of its packages are missing or too old."""
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


def _imports(name: str, problems: Problems) -> bool:
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken installation may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        problems.append(SlimrankError(f"{name} cannot be imported: {reason}", f"pip install --force-reinstall {name}"))
        return False
    return True


# devices --------------------------------------------------------------------------------------------------------


def devices() -> list[dict[str, Any]]:
    """The CPU and every accelerator: memory in bytes, whether it computes in bfloat16."""
    import torch

    found = [_cpu()]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        found += [_accelerator(torch.device(kind.type, i)) for i in range(torch.accelerator.device_count())]
    return found


def _cpu() -> dict[str, Any]:
    """Memory is that of the container where it has a limit."""
    import psutil
    import torch

    memory = psutil.virtual_memory()
    total = min(memory.total, _container_limit())
    return {
        "device": "cpu",
        "name": platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": total,
        "free": min(memory.available, total),
        "bfloat16": True,
    }


def _container_limit(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that a Linux container may take; infinity where nothing limits it."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = root / name
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            return int(text)
    return float("inf")


def _accelerator(device: torch.device) -> dict[str, Any]:
    import torch

    module: Any = torch.get_device_module(device)
    if hasattr(module, "mem_get_info"):
        free, total = module.mem_get_info(device)
    else:  # mps
        total = module.recommended_max_memory()
        free = total - module.driver_allocated_memory()
    name = module.get_device_name(device) if hasattr(module, "get_device_name") else device.type
    return {"device": str(device), "name": name, "memory": total, "free": free, "bfloat16": _bfloat16(module, device)}


def _bfloat16(module: Any, device: torch.device) -> bool:
    """Whether the device computes in bfloat16 by itself; by trying where there is nothing to ask."""
    import torch

    if hasattr(module, "is_bf16_supported"):
        with module.device(device):
            return bool(module.is_bf16_supported(including_emulation=False))
    try:
        one = torch.ones(2, 2, dtype=torch.bfloat16, device=device)
        return bool((one @ one)[0, 0] == 2)
    except (RuntimeError, TypeError):
        return False


# room -----------------------------------------------------------------------------------------------------------


def disks(needs: Mapping[str, tuple[Path, int]], problems: Problems) -> list[dict[str, Any]]:
    """Free and needed bytes of each place; places on one disk share what is free there."""
    rows: list[dict[str, Any]] = []
    on_disk: dict[int, list[dict[str, Any]]] = {}
    for what, (path, needed) in needs.items():
        try:
            whole = path.expanduser().absolute()
            home = next(p for p in (whole, *whole.parents) if p.exists())
        except (OSError, RuntimeError) as error:  # a name that no disk allows, or an unknown user (~name)
            problems.append(SlimrankError(f"'{path}' cannot be used ({what}): {error}", "another folder"))
            continue
        free = shutil.disk_usage(home).free
        rows.append({"what": what, "path": str(path), "free": free, "needed": needed})
        if needed and not os.access(home, os.W_OK):
            problems.append(SlimrankError(f"'{home}' cannot be written ({what}).", "another folder"))
        on_disk.setdefault(home.stat().st_dev, []).append(rows[-1])
    for places in on_disk.values():
        needed, free = sum(row["needed"] for row in places), places[0]["free"]
        if needed > free:
            names = " and ".join(row["what"] for row in places if row["needed"])
            message = f"{names}: {gigabytes(needed)} needed, {gigabytes(free)} free on their disk."
            problems.append(SlimrankError(message, "free some space, or --out and --run-dir on another disk"))
    return rows


def _caches() -> dict[str, tuple[Path, int]]:
    """Where models that are fetched are kept."""
    from slimrank.models.demo import cache_folder

    found = {"cache of slimrank": (cache_folder(), 0)}
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return found
    return {**found, "cache of the hub": (Path(HF_HUB_CACHE), 0)}


def _needs(
    model: str | Path,
    recipe: Recipe | None,
    found: list[dict[str, Any]],
    needs: dict[str, tuple[Path, int]],
    problems: Problems,
) -> dict[str, Any]:
    """What compressing the model takes; places in `needs` are told what they must hold."""
    from slimrank.models.placement import resolve_device
    from slimrank.pipeline.preview import preview
    from slimrank.recipe import Recipe

    made = recipe if recipe is not None else Recipe.make({"keep_ratio": 1.0})
    place, cached = _on_this_machine(model)
    record = preview(place, recipe=made)
    size = record["size"]
    needs["output"] = (needs["output"][0], size["bytes_after"])
    needs["run directory"] = (needs["run directory"][0], record["run_bytes"])
    if not cached:
        needs["cache of the hub"] = (needs["cache of the hub"][0], size["bytes_before"])
    memory = _memory(record, made, str(resolve_device(made.device)))
    for name, needed in memory.items():
        free = next(row["free"] for row in found if row["device"] in (name, f"{name}:0"))
        if needed > free:
            message = f"memory of {name}: about {gigabytes(needed)} needed, {gigabytes(free)} free."
            problems.append(SlimrankError(message, LESS_MEMORY))
    return {
        "name": str(model),
        "cached": cached,
        "parameters": size["parameters_before"],
        "bytes_before": size["bytes_before"],
        "bytes_after": size["bytes_after"],
        "memory": memory,
        "run_bytes": record["run_bytes"],
        "seconds": sum(record["seconds"].values()),
        "notes": record["notes"],
    }


def _memory(record: dict[str, Any], recipe: Recipe, device: str) -> dict[str, int]:
    """Bytes by device. Weights lie in the memory of the host; an accelerator holds what is computed, and all weights
    where it runs the whole model.
    """
    from slimrank.pipeline.forecast import LIBRARIES

    peak, weights = record["peak_memory"], record["size"]["bytes_loaded"]
    if device == "cpu":
        return {"cpu": peak}
    whole = recipe.resident or recipe.evaluation is not None
    return {"cpu": LIBRARIES + weights, device: peak - LIBRARIES - (0 if whole else weights)}


def _on_this_machine(model: str | Path) -> tuple[str, bool]:
    """A local path of the model, or of its configuration alone, and whether its weights are here.

    Raises:
        ModelError: not even the configuration is on this machine.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    from slimrank.models.demo import demo_place
    from slimrank.models.files import weight_files
    from slimrank.models.load import resolve

    fetching = f"'slimrank plan {model} --keep 0.8' fetches what is needed to look at it"
    if str(model) == "demo":
        if not (demo_place() / "config.json").is_file():
            raise ModelError("the demo model was not fetched yet, and the doctor fetches nothing.", fetching)
        return str(demo_place()), True
    source = resolve(model)
    if Path(source).exists():
        return source, True
    try:
        config = try_to_load_from_cache(source, "config.json")
    except HFValidationError as error:
        raise ModelError(f"'{model}' is no model: {error}", "a hub id, a folder, a .gguf file or demo") from error
    if not isinstance(config, str):
        raise ModelError(f"'{model}' is not in the cache of the hub, and the doctor fetches nothing.", fetching)
    folder = Path(config).parent
    weights = weight_files(folder)
    return str(folder), bool(weights) and all(path.is_file() for path in weights)


def gigabytes(count: float) -> str:
    """1.24 GB (decimal)."""
    return f"{count / 1e9:,.2f} GB"
