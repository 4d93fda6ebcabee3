"""Find the rank plan from spectra and measurements of the model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from slimrank.budget.additivity import additivity
from slimrank.budget.alternatives import alternatives, form_and_rank
from slimrank.budget.curves import Curve
from slimrank.budget.knapsack import TradeOff, trade_off
from slimrank.budget.menu import Menu
from slimrank.budget.problem import Allocation, Problem
from slimrank.pipeline.forecast import Cost, Shape
from slimrank.pipeline.stage import STAGES, Stage
from slimrank.pipeline.stages.latency import Latency
from slimrank.pipeline.stages.latency_options import check_latency, check_timed, latency_key, latency_section
from slimrank.pipeline.stages.model_probe import ModelProbe
from slimrank.pipeline.stages.spectrum_store import SpectrumStore
from slimrank.processes import by_leader
from slimrank.progress import Forecast
from slimrank.report.section import Section
from slimrank.text.texts import WindowRequest

if TYPE_CHECKING:
    from slimrank.pipeline.prepare import Choices, Prepared
    from slimrank.pipeline.state import State


@STAGES.add
class Allocate(Stage):
    """Find the ranks and make them the plan, unless the recipe gave them."""

    id, order, title = "allocate", 30, "allocate"

    def wanted(self, choices: Choices) -> bool:
        return True

    def check(self, choices: Choices) -> None:
        check_latency(choices)

    def check_model(self, prepared: Prepared) -> None:
        check_timed(prepared)

    def windows(self, choices: Choices) -> list[WindowRequest]:
        return [search_windows(choices)] if choices.measures else []

    def cost(self, prepared: Prepared, shape: Shape) -> Cost:
        passes = search_passes(prepared.choices, len(prepared.targets))
        tokens = passes * prepared.recipe.search_samples * shape.seq_len
        return Cost(products=shape.forward(tokens), float32=shape.logits_of(tokens))

    def key(self, state: State) -> dict[str, Any]:
        return {"plan": state.plan.factored(), "stored_as": state.plan.stored_as}

    def run(self, state: State) -> Section | None:
        if not state.prepared.choices.computes_ranks:
            state.results.allocation = {"id": state.plan.allocation}
            state.notes += state.prepared.about_multiple()
            return None
        assert state.prepared.problem is not None
        store = state.store(_key(state, state.prepared.problem))
        forecast = Forecast(state.progress, search_passes(state.prepared.choices, len(state.prepared.units)))
        with state.timed(self.title, forecast.steps):
            if not store.has("allocation"):
                problem = state.prepared.problem
                store.save("allocation", {}, by_leader(lambda: _found(state, problem, forecast)))
            found = store.load("allocation")[1]
            forecast.end()
        state.plan = state.prepared.plan_of(Allocation(found["ranks"], forms=found["forms"]))
        state.notes += [f"allocation: {note}" for note in (*found["notes"], *_bent(state))]
        state.notes += state.prepared.about_multiple(found["multiple"])
        state.results.allocation = found["about"]
        if "latency" in found["about"]:
            return latency_section(self.id, found["about"]["latency"])
        return _beside(found["about"], state.prepared.size.linears(state.plan))


def search_windows(choices: Choices) -> WindowRequest:
    """Return the request for the windows that measure plans, refined blocks and corrections."""
    return WindowRequest("search", choices.recipe.search_samples, disjoint=True)


def search_passes(choices: Choices, layers: int) -> float:
    """Estimate the forward passes over the search text."""
    if choices.recipe.plan is not None:
        return 0.0
    return choices.allocator.passes(layers, -(-choices.recipe.search_samples // choices.recipe.batch_size))


def _measurements_key(state: State) -> dict[str, Any]:
    """Return everything that measurements of the model's targets depend on."""
    return {
        **state.chained("calibrate"),
        "search": state.texts.digest("search") if state.prepared.choices.measures else None,
        "dtype": str(state.prepared.dtype),
    }


def _key(state: State, problem: Problem) -> dict[str, Any]:
    """Return everything that the allocation depends on."""
    return {
        **_measurements_key(state),
        "allocation": state.prepared.choices.allocator.described(),
        "items": [asdict(item) for item in problem.items],
        "budget": problem.budget,
        "multiple": _multiple_key(state, problem),
        "cost": problem.form.name,
        **({"menus": _candidates(problem)} if problem.menus else {}),
        **latency_key(state),
    }


def _multiple_key(state: State, problem: Problem) -> int | str:
    """Return the multiple of ranks; its device if it was measured, since a second measurement may find another."""
    measured = state.prepared.choices.recipe.rank_multiple == "auto"
    return f"auto on {state.prepared.device}" if measured else problem.multiple


def _candidates(problem: Problem) -> dict[str, Any]:
    return {path: [asdict(each) for each in menu.candidates] for path, menu in problem.menus.items()}


def _found(state: State, problem: Problem, forecast: Forecast) -> dict[str, Any]:
    """Compute the ranks, and what the report says about them, for the run directory."""
    spectra = SpectrumStore(state)
    with ExitStack() as stack:
        problem = with_spectra(problem, spectra, state)
        if state.prepared.choices.allocator.measures:
            measuring = state.prepared.choices.allocator.measuring
            key = {**_measurements_key(state), "measuring": measuring.model_dump(exclude={"plans"})}
            probe = ModelProbe(state, spectra, state.store(key), measuring, forecast)
            problem = replace(problem, probe=stack.enter_context(probe))
        problem, found, reached = _allocated(state, problem)
        return {
            "ranks": dict(found.ranks),
            "forms": dict(found.forms),
            "multiple": problem.multiple,
            "notes": found.notes,
            "about": {**_about(state, problem, found), **({"latency": reached} if reached else {})},
        }


def _allocated(state: State, problem: Problem) -> tuple[Problem, Allocation, dict[str, Any] | None]:
    """Return the problem as it was solved, the allocation, and the time that it reaches, if that is bounded."""
    allocator = state.prepared.choices.allocator
    if state.prepared.recipe.max_latency is None:
        return problem, allocator.allocate(problem), None
    return Latency(state).spend(problem, allocator)


def _bent(state: State) -> list[str]:
    """Name the measuring options that the windows do not allow."""
    wanted = state.prepared.choices.allocator.measuring.dropped
    if not state.prepared.choices.allocator.measures or wanted is None or state.texts.get("search") is None:
        return []
    found = state.prepared.choices.allocator.measuring.positions(int(state.texts["search"].shape[1]))
    return [f"of a window only {found} positions can be dropped, not {wanted}"] if found < wanted else []


def _about(state: State, problem: Problem, found: Allocation) -> dict[str, Any]:
    about = {**state.prepared.choices.allocator.described(), "gap": found.gap}
    if found.curves:
        about["trade_off"] = _sketch(trade_off(found.curves), float(problem.sizes.sum()))
        picks = found.picks or found.ranks
        about["predicted"] = sum(float(c.errors[c.index(picks[c.path])]) for c in found.curves)
    if problem.menus and state.prepared.recipe.bits:
        energies = {curve.path: _energy(curve, problem.menus[curve.path]) for curve in found.curves}
        about["alternatives"] = [asdict(each) for each in alternatives(problem.menus, energies)]
    plans = state.prepared.choices.allocator.measuring.plans
    if found.divergence and plans > 1 and not problem.menus:  # plans of bits are not measured before they are made
        about["additivity"] = asdict(additivity(problem, found.curves, plans))
    return about


def _energy(curve: Curve, menu: Menu) -> float:
    """Return what the losses of a menu are multiplied by in a curve."""
    loss = float(menu.errors()[curve.ranks[0]])
    return float(curve.errors[0]) / loss if loss > 0 else 0.0


def _beside(allocation: Mapping[str, Any], size: int) -> Section | None:
    """Return what one form for all layers would take and lose, over the plan."""
    if "alternatives" not in allocation:
        return None
    whole = allocation["predicted"] or 1.0
    rows = [
        (form_and_rank(each), f"{each['size']:,}", f"{each['error'] / whole:.2f}")
        for each in allocation["alternatives"]
    ]
    note = f"Predicted from the rounding of each layer by itself. The plan takes {size:,} bytes; its loss is 1."
    columns = ("all layers as", "bytes", "predicted loss, over the plan's")
    return Section(stage=Allocate.id, title="One form for all layers", columns=columns, rows=tuple(rows), note=note)


def _sketch(path: TradeOff, whole: float) -> list[dict[str, float]]:
    """Return the predicted error at several sizes along the whole path."""
    sizes = [k / 20 for k in range(1, 21)]
    places = np.searchsorted(path.costs, [size * whole for size in sizes], side="right") - 1
    return [
        {"keep_ratio": size, "error": float(path.errors[place])}
        for size, place in zip(sizes, places.tolist(), strict=True)
        if place >= 0
    ]


def with_spectra(problem: Problem, spectra: SpectrumStore, state: State) -> Problem:
    """Return the problem with the singular values of all its items.

    Items whose metric was zero have no energy: no calibration token would miss the layer.
    """
    found = {}
    for unit in state.prepared.units:
        spectrum, _ = spectra.of(unit)
        nothing = np.zeros(min(unit.shape)), 0.0
        found[unit.path] = nothing if spectrum.stand_in else (spectrum.values.cpu().numpy(), spectrum.beyond)
    menus = {path: menu.measured(state.results.losses[path]) for path, menu in problem.menus.items()}
    return replace(problem, menus=menus, spectra=found, in_loss=state.prepared.choices.method.gathering.backward)
