"""Check whether this machine can do the work: versions, extras, devices, and room for a model. Uses no network.

Packages may be missing or broken here, so torch and transformers are imported only after a check.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimrank._version import __version__
from slimrank.doctor.hardware import devices
from slimrank.doctor.packages import Problems, distributions, imports
from slimrank.doctor.room import caches, disks, needs_of
from slimrank.errors import SlimrankError

if TYPE_CHECKING:
    from slimrank.recipe import Recipe

IMPORTED = ("torch", "transformers")


def diagnose(
    model: str | Path | None = None,
    recipe: Recipe | None = None,
    out: str | Path | None = None,
    run_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Describe this machine, and what is wrong with it.

    Args:
        model: also check memory and disk for compressing this model. It must be on this machine.
        recipe: how to compress it, with a budget. By default the defaults of `compress` with the largest budget.
        out: where the compressed model would go; the working folder by default.
        run_dir: where the run directory would be; beside `out` by default.

    Returns:
        A record with "slimrank" (version), "packages", "extras", "devices", "disks", "model" (None, or what it needs;
        bytes and seconds are estimates), "problems" (each with "message" and "hint") and "ok". Missing extras are
        not problems.
    """
    problems: Problems = []
    packages, extras = distributions(problems)
    works = [imports(name, problems) for name in IMPORTED]
    found = devices() if works[0] else []
    place = Path(out) if out is not None else Path.cwd()
    beside = Path(run_dir) if run_dir is not None else place.with_name(place.name + ".run") if out else place
    needs = {"output": (place, 0), "run directory": (beside, 0), **caches()}
    about = None
    if model is not None and all(works):
        try:
            about = needs_of(model, recipe, found, needs, problems)
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
