"""The passes that gather statistics: forwards, backwards, the whole model at once, and from a cache."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

from slimrank.models.gradients import loss_gradients, step_back, whole_model_gradients
from slimrank.models.page_out import page_out
from slimrank.models.states import HiddenState, states_named
from slimrank.pipeline.stages.calibration_pass import CalibrationPass
from slimrank.pipeline.stages.statistics_cache import StatisticsCache
from slimrank.statistics.catalogue import Need
from slimrank.store import Store

if TYPE_CHECKING:
    from slimrank.pipeline.state import State

TITLE = "calibrate and decompose"


class Forwards(CalibrationPass):
    """For methods that need no gradients, or no text at all."""

    def run(self) -> None:
        """Run the blocks in order. Hidden states are stored whenever no unit waits for a later block."""
        runner, state = self.runner, self.state
        with state.timed(TITLE, len(runner)), runner.session():
            first = _finished(self.store, len(runner))
            self.waiting = [u for u in self.waiting if max(u.blocks) >= first]
            _resume_note(state, first, len(runner))
            if first < len(runner):
                self._start(first)
            for index in range(first, len(runner)):
                self._block(index)
                page_out(runner.blocks[index])
                state.progress.step()

    def _start(self, first: int) -> None:
        state, runner = self.state, self.runner
        runner.embed(self.batches)
        page_out(state.model)
        if first and runner.batches:
            stored, _ = self.store.load("hidden", str(state.prepared.device) if runner.resident else "cpu")
            runner.states = states_named(stored, "", self.numbers)

    def _block(self, index: int) -> None:
        runner = self.runner
        with runner.placed_block(index):
            collector = self.collector(index)
            with collector if runner.batches else nullcontext():
                runner.step(index, lambda batch: collector.begin(batch.attention_mask, batch.input_ids.shape))
            self.take(collector, index)
            self.solve_ready(index, set(range(index + 1)))
        if self.state.resumable and not any(min(u.blocks) <= index for u in self.waiting):
            self.save_states("hidden", runner.states, {"next": index + 1})


class Backwards(CalibrationPass):
    """For methods that need gradients: store the inputs of every block, then run the blocks from the last."""

    def run(self) -> None:
        """Run forwards to the loss, then backwards."""
        runner, state = self.runner, self.state
        with state.timed(TITLE, 2 * len(runner)), runner.session():
            last = int(self.store.load("gradients")[1]["next"]) if self.store.has("gradients") else len(runner)
            self.waiting = [u for u in self.waiting if min(u.blocks) < last]
            if last:
                runner.embed(self.batches)
                page_out(state.model)
                gradients = self._forwards(last)
                for index in reversed(range(last)):
                    self._block(index, gradients)
                    page_out(runner.blocks[index])
                    state.progress.step()

    def _forwards(self, last: int) -> list[HiddenState]:
        """Store the inputs of blocks up to `last`; return the gradients by its inputs.

        If `last` is beyond the last block, these are the gradients of the loss by the final hidden states.
        """
        runner, state, store = self.runner, self.state, self.store
        _resume_note(state, len(runner) - last, len(runner))
        top = last if last == len(runner) else last - 1
        done = max((i for i in range(top + 1) if store.has(f"input-{i:04d}")), default=None)
        if done is None:
            self.save_states("input-0000", runner.states)
        else:
            runner.states = self._input(done)
        for index in range(done or 0, top):
            runner.step(index)
            page_out(runner.blocks[index])
            self.save_states(f"input-{index + 1:04d}", runner.states)
            state.progress.step()
        if last < len(runner):
            return states_named(store.load("gradients")[0], "", self.numbers)
        gradients = loss_gradients(runner, runner.hidden)
        runner.states = []
        self.save_states("gradients", gradients, {"next": last})
        return gradients

    def _input(self, index: int) -> list[HiddenState]:
        tensors, _ = self.store.load(f"input-{index:04d}")
        return states_named(tensors, "", self.numbers)

    def _block(self, index: int, gradients: list[HiddenState]) -> None:
        runner = self.runner
        with runner.placed_block(index):
            collector = self.collector(index)
            with collector:
                step_back(
                    runner,
                    index,
                    self._input(index),
                    gradients,
                    lambda batch: collector.begin(batch.attention_mask, batch.input_ids.shape),
                )
            self.take(collector, index)
            self.solve_ready(index, set(range(index, len(runner))))
        if not any(max(u.blocks) >= index for u in self.waiting):
            self.save_states("gradients", gradients if index else [], {"next": index})
            for later in range(index, len(runner) + 1):
                self.store.drop(f"input-{later:04d}")


class WholeModel(CalibrationPass):
    """For gradients of a resident model: nothing is computed twice, and all statistics are held at once."""

    def run(self) -> None:
        """Run all batches, then solve all blocks."""
        runner, state, blocks = self.runner, self.state, len(self.runner)
        with state.timed(TITLE, blocks + len(self.batches)), runner.session():
            if all(self.store.has(f"block-{i:04d}") for i in range(blocks)):
                return
            runner.batches = list(self.batches)
            collectors = [self.collector(i) for i in range(blocks)]

            def begin(batch: Any) -> None:
                for collector in collectors:
                    collector.begin(batch.attention_mask, batch.input_ids.shape)

            with ExitStack() as stack:
                for collector in collectors:
                    stack.enter_context(collector)
                for _ in whole_model_gradients(runner, begin):
                    state.progress.step()
            for index, collector in enumerate(collectors):
                self.take(collector, index)
                self.solve_ready(index, set(range(index + 1)))
                state.progress.step()


class FromCache(CalibrationPass):
    """For methods whose statistics are stored already: the model does not run."""

    def __init__(self, state: State, store: Store, kept: StatisticsCache, sources: Sequence[Need]) -> None:
        super().__init__(state, store, kept)
        self.stored, self.sources = kept, sources

    def run(self) -> None:
        """Solve every block without stored spectra, in the order in which a run would gather them."""
        state, blocks = self.state, len(self.runner)
        backwards = state.prepared.backwards
        missing = {index for index in range(blocks) if not self.store.has(f"block-{index:04d}")}
        if missing and any(len(unit.blocks) > 1 for unit in state.prepared.units):
            missing = set(range(blocks))
        self.waiting = [unit for unit in self.waiting if unit.blocks & missing]
        with state.timed(TITLE, blocks):
            for index in reversed(range(blocks)) if backwards else range(blocks):
                if index in missing:
                    self._block(index, backwards)
                state.progress.step()

    def _block(self, index: int, backwards: bool) -> None:
        method, ranks = self.state.prepared.choices.method, self.state.plan.factored()
        statistics, leaders = self.stored.load(index, self.sources, method.gathering, ranks)
        self.gathered |= statistics
        self.leaders |= leaders
        self.solve_ready(index, set(range(index, len(self.runner)) if backwards else range(index + 1)))


def _finished(store: Store, blocks: int) -> int:
    """Count the leading blocks whose spectra and outputs are stored."""
    done = int(store.load("hidden")[1]["next"]) if store.has("hidden") else 0
    return done if all(store.has(f"block-{i:04d}") for i in range(done)) and done <= blocks else 0


def _resume_note(state: State, done: int, blocks: int) -> None:
    if done:
        state.progress.note(f"resuming at block {done} of {blocks}")
        state.progress.step(done)
