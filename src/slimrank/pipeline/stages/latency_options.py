"""What a recipe says of latency: its checks, its part of keys, and its section of the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slimrank.errors import RecipeError
from slimrank.layers.experts import experts_of
from slimrank.methods.allocator import ALLOCATORS
from slimrank.report.section import Section

if TYPE_CHECKING:
    from slimrank.pipeline.prepare import Choices, Prepared
    from slimrank.pipeline.state import State

OPTIONS = ("latency", "latency_batch", "latency_tokens")


def check_latency(choices: Choices) -> None:
    """Make sure that options of latency fit the others.

    Raises:
        RecipeError: they do not.
    """
    recipe = choices.recipe
    if recipe.max_latency is None:
        for name in OPTIONS:
            if getattr(recipe, name) != type(recipe).model_fields[name].default:
                raise RecipeError(f"{name} is given, but no max_latency.", "--max-latency 0.7")
        return
    if not choices.allocator.allocator.joint:
        able = ", ".join(f"--allocation {found.id}" for found in ALLOCATORS.all().values() if found.joint)
        raise RecipeError(f"the allocation '{recipe.allocation}' cannot spend time instead of numbers.", able)
    if choices.method.method.groups:
        raise RecipeError(
            f"'{recipe.method}' shares factors between layers, whose time is not measured.", "another method"
        )


def check_timed(prepared: Prepared) -> None:
    """Make sure that the time of a model's layers can be measured.

    Raises:
        RecipeError: it has experts.
    """
    if prepared.recipe.max_latency is not None and experts_of(prepared.model):
        raise RecipeError(
            "the time of experts depends on the tokens that they get, so max_latency is not possible.", "--keep 0.8"
        )


def latency_key(state: State) -> dict[str, Any]:
    """Return what an allocation by time depends on, besides the time that was measured."""
    recipe = state.prepared.recipe
    if recipe.max_latency is None:
        return {}
    names = ("max_latency", *OPTIONS, "packed")
    return {name: getattr(recipe, name) for name in names} | {"device": str(state.prepared.device)}


def latency_section(stage: str, found: Mapping[str, Any]) -> Section:
    """Return the time that was asked for, and the one that the ranks reach."""
    before, after = found["seconds"]
    row = f"{found['asked']:.2f}", f"{found['reached']:.2f}", f"{before * 1000:,.1f}", f"{after * 1000:,.1f}"
    what = "one decoding step" if found["phase"] == "decode" else "reading the prompt"
    note = (
        f"Time of {what}, batch {found['batch']}, {found['tokens']} tokens, over the original's: measured in turns on "
        f"this machine, with {'packed ' if found['packed'] else ''}layers of these ranks."
    )
    columns = ("asked", "reached", "ms before", "ms after")
    return Section(stage=stage, title="Latency", columns=columns, rows=(row,), note=note)
