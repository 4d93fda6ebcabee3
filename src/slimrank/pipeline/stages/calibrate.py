"""Calibrate and decompose: compute the spectra of all targets, block by block, and store them.

The method's needs choose the way: forwards; forwards and then backwards, with each block's forward computed again; or,
for gradients of a resident model, batch by batch through the whole model. If another method has gathered all statistics
already, stored statistics are used instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimrank.models.placement import resolve_device
from slimrank.models.precision import autocasts
from slimrank.models.structure import find_blocks
from slimrank.models.targets import TargetSet
from slimrank.pipeline.forecast import Cost, Shape, group_widths
from slimrank.pipeline.stage import STAGES, Stage
from slimrank.pipeline.stages.calibration_ways import TITLE, Backwards, Forwards, FromCache, WholeModel
from slimrank.pipeline.stages.statistics_cache import StatisticsCache
from slimrank.pipeline.units import units_of
from slimrank.store import Store
from slimrank.text.texts import WindowRequest

if TYPE_CHECKING:
    from slimrank.methods.decomposer import Configured
    from slimrank.pipeline.prepare import Choices, Prepared
    from slimrank.pipeline.state import State

SOLVES_PER_WEIGHT = {"once": 1, "twice": 2}  # eigen-problems per weight, of methods that solve as often as that


@STAGES.add
class Calibrate(Stage):
    """Gather the statistics that the method needs, and solve for the spectrum of every target."""

    id, order, title = "calibrate", 20, TITLE

    def wanted(self, choices: Choices) -> bool:
        return True

    def check(self, choices: Choices) -> None:
        if choices.recipe.compute_dtype == "bfloat16":
            autocasts("bfloat16", resolve_device(choices.recipe.device))

    def windows(self, choices: Choices) -> list[WindowRequest]:
        return [WindowRequest("calibration", choices.recipe.samples)] if choices.method.gathering.calibrates else []

    def cost(self, prepared: Prepared, shape: Shape) -> Cost:
        method, recipe = prepared.choices.method, prepared.recipe
        solves = SOLVES_PER_WEIGHT.get(method.method.solves, 1 + -(-recipe.samples // recipe.batch_size))
        return Cost(
            products=_passes(prepared) * shape.forward(shape.tokens.get("calibration", 0)),
            float32=_operations(prepared, shape),
            float64=solves * shape.decompose(),
            peak=_peak_bytes(prepared, shape),
            stored=_stored_bytes(prepared, shape),
        )

    def key(self, state: State) -> dict[str, Any]:
        method = state.prepared.choices.method
        at_ranks = method.gathering.needs & {"rank", "projectors"}
        ranks = state.prepared.plan.factored() if at_ranks else None
        return {**_surroundings(state), "method": method.described(), "ranks": ranks}

    def is_done(self, state: State) -> bool:
        store = state.store(state.chained(self.id))
        return all(store.has(f"block-{index:04d}") for index in range(len(find_blocks(state.model)[1])))

    def run(self, state: State) -> None:
        cache = None
        if state.keeps_statistics:
            store = state.store({**state.inputs.identity(), **_surroundings(state)})
            cache = StatisticsCache(store, len(find_blocks(state.model)[1]), state.prepared.solver)
        decompose(state, state.store(state.chained(self.id)), cache)


def _surroundings(state: State) -> dict[str, Any]:
    """Return what statistics depend on besides the inputs. Pivot layers may add targets."""
    return {**state.environment(), "count": len(state.prepared.targets)}


def decompose(state: State, store: Store, cache: StatisticsCache | None = None) -> None:
    """Put the spectra of all targets into the store; finished blocks are not repeated.

    Args:
        state: holds model, text and method.
        store: where spectra are stored.
        cache: statistics of other methods over the same text, which this one's are added to. If all that the method
            needs is there the text is not read.
    """
    gathering = state.prepared.choices.method.gathering
    sources = cache.sources(gathering) if cache is not None else None
    if cache is not None and sources is not None:
        FromCache(state, store, cache, sources).run()
    elif not gathering.backward:
        Forwards(state, store, cache).run()
    elif state.prepared.recipe.resident:
        WholeModel(state, store, cache).run()
    else:
        Backwards(state, store, cache).run()


# cost -----------------------------------------------------------------------------------------------------------


def _held_gradients(prepared: Prepared) -> int:
    """Count the weight gradients held per weight; 0 for a method that needs none."""
    gathering = prepared.choices.method.gathering
    return -(-prepared.recipe.samples // gathering.accumulate) if "gradients" in gathering.needs else 0


def _passes(prepared: Prepared) -> float:
    """Count the passes through the blocks; those for gradients go forwards twice and backwards once."""
    gathering = prepared.choices.method.gathering
    return 3.2 if gathering.backward else float(gathering.calibrates)


def _operations(prepared: Prepared, shape: Shape) -> float:
    """Count the operations of sums and of the output head."""
    gathering, tokens = prepared.choices.method.gathering, shape.tokens.get("calibration", 0)
    grams = shape.grams(tokens)
    if gathering.backward:  # the head thrice; grams on both sides
        held = 12 * _held_gradients(prepared) * sum(t.parameters * sum(t.shape) for t in shape.targets)
        return 2.2 * grams + 3 * shape.logits_of(tokens) + held
    return grams if gathering.calibrates else 0.0


def _peak_bytes(prepared: Prepared, shape: Shape) -> int:
    gathering = prepared.choices.method.gathering
    hidden = shape.tokens.get("calibration", 0) * shape.width * shape.compute_bytes
    grams = sum(12 * n * n for n in group_widths(shape.first)) if gathering.calibrates else 0
    activations = (16 if gathering.backward else 6) * shape.batch_tokens * shape.widest * shape.compute_bytes
    if gathering.backward:
        hidden = 2 * hidden
        grams = 3 * grams + 4 * _held_gradients(prepared) * sum(t.parameters for t in shape.first)
        if shape.resident:
            grams, activations = shape.compressed_blocks * grams, shape.compressed_blocks * activations
        activations = max(activations, 16 * shape.logits)
    return shape.copies + hidden + grams + shape.solving + activations


def _stored_bytes(prepared: Prepared, shape: Shape) -> int:
    """Count the bytes of all bases, hidden states and, where they are stored, statistics."""
    method, recipe = prepared.choices.method, prepared.recipe
    backward = method.gathering.backward
    units = units_of(method, prepared.targets, recipe.stored_as)
    numbers = sum(min(unit.shape) ** 2 for unit in units) * (2 if backward else 1)
    numbers += 2 * _statistics(prepared.targets, method) if shape.keeps_statistics else 0
    copies = (1 if shape.resumable else 0) + (2 + shape.blocks if prepared.backwards else 0)
    return 4 * (numbers + copies * shape.tokens.get("calibration", 0) * shape.width)


def _statistics(targets: TargetSet, method: Configured) -> int:
    """Count the numbers in the statistics of all layers."""
    if "gram" in method.gathering.needs:
        return sum(n * n for n in group_widths(targets))
    return sum(min(t.shape) ** 2 for t in targets) * (2 if method.gathering.backward else 1)
