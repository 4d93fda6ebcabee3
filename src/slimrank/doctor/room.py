"""Room for a model: what compressing it needs, and what disks and devices have."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimrank.doctor.packages import Problems
from slimrank.errors import ModelError, SlimrankError

if TYPE_CHECKING:
    from slimrank.recipe import Recipe

LESS_MEMORY = "use a machine with more memory, --dtype bfloat16, a smaller --batch-size or --samples, or no --resident"


def disks(needs: Mapping[str, tuple[Path, int]], problems: Problems) -> list[dict[str, Any]]:
    """List free and needed bytes of each place; places on one disk share what is free there."""
    rows: list[dict[str, Any]] = []
    on_disk: dict[int, list[dict[str, Any]]] = {}
    for what, (path, needed) in needs.items():
        try:
            whole = path.expanduser().absolute()
            home = next(p for p in (whole, *whole.parents) if p.exists())
        except (OSError, RuntimeError) as error:  # a name that no disk allows, or an unknown user (~name)
            problems.append(SlimrankError(f"'{path}' cannot be used ({what}): {error}", "choose another folder"))
            continue
        free = shutil.disk_usage(home).free
        rows.append({"what": what, "path": str(path), "free": free, "needed": needed})
        if needed and not os.access(home, os.W_OK):
            problems.append(SlimrankError(f"'{home}' cannot be written ({what}).", "choose another folder"))
        on_disk.setdefault(home.stat().st_dev, []).append(rows[-1])
    for places in on_disk.values():
        needed, free = sum(row["needed"] for row in places), places[0]["free"]
        if needed > free:
            names = " and ".join(row["what"] for row in places if row["needed"])
            message = f"{names}: {gigabytes(needed)} needed, {gigabytes(free)} free on their disk."
            problems.append(SlimrankError(message, "free some space, or choose --out and --run-dir on another disk"))
    return rows


def caches() -> dict[str, tuple[Path, int]]:
    """List the folders that downloaded models are stored in."""
    from slimrank.models.demo import cache_folder

    found = {"cache of slimrank": (cache_folder(), 0)}
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return found
    return {**found, "cache of the hub": (Path(HF_HUB_CACHE), 0)}


def needs_of(
    model: str | Path,
    recipe: Recipe | None,
    found: list[dict[str, Any]],
    needs: dict[str, tuple[Path, int]],
    problems: Problems,
) -> dict[str, Any]:
    """Estimate what compressing the model needs; `needs` is updated by the bytes that each place must hold."""
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
    """Estimate bytes by device.

    Weights are in the memory of the host. An accelerator holds what is computed, and all weights if it runs the whole
    model.
    """
    from slimrank.pipeline.forecast import LIBRARIES

    peak, weights = record["peak_memory"], record["size"]["bytes_loaded"]
    if device == "cpu":
        return {"cpu": peak}
    whole = recipe.resident or recipe.evaluation is not None
    return {"cpu": LIBRARIES + weights, device: peak - LIBRARIES - (0 if whole else weights)}


def _on_this_machine(model: str | Path) -> tuple[str, bool]:
    """Return a local path of the model, or of its configuration alone, and whether its weights are here.

    Raises:
        ModelError: the configuration is not on this machine.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    from slimrank.models.demo import demo_place
    from slimrank.models.files import weight_files
    from slimrank.models.load import resolve

    fetching = f"'slimrank plan {model} --keep 0.8' downloads what is needed to check it"
    if str(model) == "demo":
        if not (demo_place() / "config.json").is_file():
            raise ModelError("the demo model was not downloaded yet, and the doctor downloads nothing.", fetching)
        return str(demo_place()), True
    source = resolve(model)
    if Path(source).exists():
        return source, True
    try:
        config = try_to_load_from_cache(source, "config.json")
    except HFValidationError as error:
        raise ModelError(
            f"'{model}' is not a model: {error}", "give a hub id, a folder, a .gguf file or demo"
        ) from error
    if not isinstance(config, str):
        raise ModelError(f"'{model}' is not in the cache of the hub, and the doctor downloads nothing.", fetching)
    folder = Path(config).parent
    weights = weight_files(folder)
    return str(folder), bool(weights) and all(path.is_file() for path in weights)


def gigabytes(count: float) -> str:
    """Format bytes for people: 1.24 GB (decimal)."""
    return f"{count / 1e9:,.2f} GB"
