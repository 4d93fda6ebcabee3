"""Move all factors at once against the divergence of the whole model from the original, a few times.

Each round takes some windows forwards and backwards through the compressed model. These windows do not calibrate: on
calibration windows refined layers are nearer to the original than elsewhere, so the gradient tells little.

A round gives, for every factored layer, the gradient of the divergence by its weight and the gram of its inputs. All
factors move along the tangent step of `linalg.tangent`, by the same length. The first length is half of Polyak's
(1987): the divergence over its decrease by the whole step, to first order. It is halved as long as that brings held-out
windows nearer to the original. A round that never does is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from slimrank.layers.base import CompressedLinear, load_tensors
from slimrank.layers.forms import layer_form
from slimrank.linalg.forms import channel_energies
from slimrank.linalg.tangent import tangent_step
from slimrank.models.divergence import divergence_gradients
from slimrank.models.gradients import step_back
from slimrank.models.page_out import page_out
from slimrank.models.recording import Batch
from slimrank.models.states import HiddenState, named, states_named
from slimrank.models.targets import Target
from slimrank.pipeline.stages.held_out_check import HeldOutCheck
from slimrank.statistics.catalogue import GatherOptions
from slimrank.statistics.collector import Collector
from slimrank.statistics.layer_statistics import LayerStatistics
from slimrank.store import Store

if TYPE_CHECKING:
    from slimrank.pipeline.state import State


TITLE, REMEMBER = "correct", "remember the original"
HELD_OUT_WINDOWS = 4  # search windows that judge a round
FIRST_STEP_LENGTH = 0.5  # of Polyak's step, to begin with
DAMPING = 1.0  # of the form on the inputs, in units of the energy of each channel
MAX_TRIALS = 6


class Correction:
    """Rounds of correction of a factorized model. Call `remember` before it is factorized, `run` afterwards.

    Args:
        state: holds the model and the plan, which says which layers are factored.
        store: where gradients, steps and the factors of the last round are stored.
    """

    def __init__(self, state: State, store: Store) -> None:
        self.state, self.store = state, store
        self.runner = state.runner(resident=False)
        self.held_out = HeldOutCheck(state, HELD_OUT_WINDOWS, store)
        self.rounds: list[dict[str, Any]] = []
        assert state.texts.get("correction") is not None
        self._windows = state.texts["correction"].split(state.prepared.recipe.correction_windows)

    def remember(self) -> None:
        """Take the windows of all rounds, and the held-out windows, through the original model."""
        state, rounds = self.state, self.state.prepared.recipe.corrections
        with state.timed(REMEMBER, rounds + 1), self.runner.session():
            self.held_out.start()
            state.progress.step()
            for number in range(rounds):
                if not self.store.has(_original(number)):
                    self._embed(number)
                    final = self.runner.through(self.runner.states, 0, len(self.runner))
                    self.store.save(_original(number), named("", final))
                state.progress.step()

    def run(self) -> list[dict[str, Any]]:
        """Correct the factorized model.

        Returns:
            For each round: its divergence `here` before the step, the divergence on held-out windows `before` and
            `after`, the `length` of the step, and `kept`: whether the step was accepted.
        """
        state, runner = self.state, self.runner
        with state.timed(TITLE, 2 * len(runner) * state.prepared.recipe.corrections), runner.session():
            self._take_up()
            now = self.rounds[-1]["after"] if self.rounds else self.held_out.divergence(0)
            for number in range(len(self.rounds), state.prepared.recipe.corrections):
                divergence, decrease = self._gather(number)
                self.rounds.append(self._move(now, divergence, decrease))
                now = self.rounds[-1]["after"]
                self._store(number)
        return self.rounds

    # gathering ----------------------------------------------------------------------------------------------

    def _embed(self, number: int) -> None:
        self.runner.embed([Batch(ids) for ids in self._windows[number].split(self.state.prepared.recipe.batch_size)])

    def _gather(self, number: int) -> tuple[float, float]:
        """Store the steps of all layers; return the divergence, and its decrease by whole steps to first order."""
        runner, state, store = self.runner, self.state, self.store
        self._embed(number)
        for index in range(len(runner)):
            store.save(f"input-{index:04d}", named("", runner.states))
            runner.step(index)
            page_out(runner.blocks[index])
            state.progress.step()
        stored, _ = store.load(_original(number))
        original = [state.hidden for state in states_named(stored, "", range(len(runner.batches)))]
        gradients, divergence = divergence_gradients(runner, runner.hidden, original)
        decrease = 0.0
        for index in reversed(range(len(runner))):
            decrease += self._block(index, gradients)
            store.drop(f"input-{index:04d}")
            page_out(runner.blocks[index])
            state.progress.step()
        return divergence, decrease

    def _block(self, index: int, gradients: list[HiddenState]) -> float:
        """Store the steps of a block's layers; return the decrease of the divergence by them, to first order."""
        layers = {t.path: self._layer(t) for t in self._targets(index)}
        collector = Collector(layers, GatherOptions(needs=frozenset({"gram", "slope"})), self.state.prepared.solver)
        inputs = states_named(self.store.load(f"input-{index:04d}")[0], "", range(len(self.runner.batches)))
        with collector:
            step_back(
                self.runner,
                index,
                inputs,
                gradients,
                lambda batch: collector.begin(batch.attention_mask, batch.input_ids.shape),
            )
        tensors: dict[str, Tensor] = {}
        decrease = 0.0
        for path, layer in layers.items():
            found = collector.statistics.get(path)
            if found is not None and found.slope is not None and found.tokens:
                decrease += self._solve(path, layer, found, tensors)
        self.store.save(f"step-{index:04d}", tensors)
        return decrease

    def _solve(self, path: str, layer: CompressedLinear, found: LayerStatistics, tensors: dict[str, Tensor]) -> float:
        assert found.slope is not None
        form = found.gram + DAMPING * channel_energies(found.gram.diagonal()).diag()
        a, b = (factor.to(form) for factor in layer.factors())
        step = tangent_step(a, b, found.slope, form)
        tensors |= {f"{path}.A": step.A.float().cpu(), f"{path}.B": step.B.float().cpu()}
        return step.decrease

    # moving -------------------------------------------------------------------------------------------------

    def _move(self, before: float, divergence: float, decrease: float) -> dict[str, Any]:
        """Take the steps, as long as held-out windows get nearer to the original."""
        tokens = self._windows[0].numel()
        row = {"here": divergence / tokens, "before": before, "after": before, "length": 0.0, "kept": False}
        if not decrease > 0:
            return row
        states = {t.path: dict(self._layer(t).state_dict()) for i in range(len(self.runner)) for t in self._targets(i)}
        nearest, length = before, FIRST_STEP_LENGTH * divergence / decrease
        for _ in range(MAX_TRIALS):
            self._step(states, length)
            found = self.held_out.divergence(0)
            if not found < nearest and nearest < before:
                break
            if found < nearest:
                nearest, row = found, {**row, "after": found, "length": length, "kept": True}
            length /= 2
        self._step(states, row["length"])
        return row

    def _step(self, states: Mapping[str, Mapping[str, Tensor]], length: float) -> None:
        """Set all layers to their former factors plus `length` times their steps."""
        state = self.state
        for index in range(len(self.runner)):
            steps, _ = self.store.load(f"step-{index:04d}")
            for target in self._targets(index):
                layer = self._layer(target)
                if f"{target.path}.A" not in steps:
                    continue
                load_tensors(layer, states[target.path])
                if not length:
                    continue
                a, b = (factor.to(state.prepared.solver) for factor in layer.factors())
                a, b = a + length * steps[f"{target.path}.A"].to(a), b + length * steps[f"{target.path}.B"].to(b)
                load_tensors(
                    layer, layer_form(state.plan.stored_as).build(a, b, None, dtype=state.prepared.dtype).state_dict()
                )

    # layers and resuming ------------------------------------------------------------------------------------

    def _targets(self, index: int) -> list[Target]:
        """Return the factored targets of a block, without tied weights."""
        inside = self.state.prepared.targets.in_block(index)
        return [t for t in inside if self.state.plan.targets[t.path].rank != "dense" and not t.ties]

    def _layer(self, target: Target) -> CompressedLinear:
        return self.state.model.get_submodule(target.path)

    def _store(self, number: int) -> None:
        if self.state.resumable:
            for index in range(len(self.runner)):
                held = {t.path: self._layer(t).state_dict() for t in self._targets(index)}
                tensors = {f"{path}.{name}": tensor for path, state in held.items() for name, tensor in state.items()}
                self.store.save(f"factors-{number}-{index:04d}", tensors)
            self.store.save("rounds", {}, {"rounds": self.rounds})
            for index in range(len(self.runner)):
                self.store.drop(f"factors-{number - 1}-{index:04d}")

    def _take_up(self) -> None:
        """Resume after the stored rounds."""
        if not self.store.has("rounds"):
            return
        self.rounds = list(self.store.load("rounds")[1]["rounds"])
        self.state.progress.note(f"resuming at round {len(self.rounds)} of {self.state.prepared.recipe.corrections}")
        for index in range(len(self.runner)):
            tensors, _ = self.store.load(f"factors-{len(self.rounds) - 1}-{index:04d}")
            for target in self._targets(index):
                mine = f"{target.path}."
                load_tensors(
                    self._layer(target), {k.removeprefix(mine): t for k, t in tensors.items() if k.startswith(mine)}
                )
        self.state.progress.step(2 * len(self.runner) * len(self.rounds))


def _original(number: int) -> str:
    return f"original-{number:04d}"
