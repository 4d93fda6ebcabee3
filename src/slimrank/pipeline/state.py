"""What the stages of a compression share: the prepared recipe, the texts, the store, and what was found so far."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from slimrank._version import __version__
from slimrank.budget.menu import Family, Loss
from slimrank.budget.rank_plan import RankPlan
from slimrank.models.blocks import Batch, BlockRunner
from slimrank.pipeline.prepare import Prepared
from slimrank.pipeline.shared_store import SharedStore
from slimrank.pipeline.stage import Stage
from slimrank.processes import processes
from slimrank.progress import Progress
from slimrank.report.section import Section
from slimrank.store import Run, Store
from slimrank.text.texts import Texts


@dataclass(frozen=True)
class Inputs:
    """What was loaded for a run.

    Attributes:
        prepared: the recipe, resolved for the model.
        texts: the token windows.
        tokenizer: the model's.
        digest: of the model's weights.
        origin: where the model comes from, for the report.
        file_bytes: of weights that were widened when they were loaded; None if they were not.
        notes: what loading and reading changed or skipped.
    """

    prepared: Prepared
    texts: Texts
    tokenizer: Any
    digest: str
    origin: dict[str, Any]
    file_bytes: int | None
    notes: list[str]

    def identity(self) -> dict[str, Any]:
        """Return what the run is about; a run directory made for anything else is refused."""
        recipe = self.prepared.recipe
        return {
            "model": self.digest,
            "calibration": self.texts.digest("calibration"),
            "targets": list(recipe.targets),
            "ignore": list(recipe.ignore),
            "split": dict(recipe.split),
        }


@dataclass
class Results:
    """What stages have found, as the report tells it.

    Attributes:
        before: measurements of the original model.
        after: measurements of the compressed model.
        rows: target -> its errors and its group.
        spectra: unit -> the outline of its spectrum.
        losses: target -> what each family of forms loses of its outputs.
        new_biases: parameters of biases that the original model does not have.
        allocation: what the report says of the allocation.
        corrections: the rounds of correction.
        sections: what other stages tell.
        record: the content of report.json, once it is made.
    """

    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    spectra: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    losses: dict[str, dict[Family, Loss]] = field(default_factory=dict)
    new_biases: int = 0
    allocation: dict[str, Any] = field(default_factory=dict)
    corrections: list[dict[str, Any]] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    record: dict[str, Any] | None = None


@dataclass
class State:
    """One compression while it runs.

    Attributes:
        inputs: what was loaded.
        run: the run directory.
        stages: all stages, in order.
        progress: told what happens.
        resumable: whether finished parts are stored.
        keeps_statistics: whether statistics are stored, too.
        plan: the ranks, as far as they are known.
        results: what was found.
        notes: anything unusual.
        seconds: the time of each part, by its title.
    """

    inputs: Inputs
    run: Run
    stages: Sequence[Stage]
    progress: Progress
    resumable: bool
    keeps_statistics: bool
    plan: RankPlan
    results: Results = field(default_factory=Results)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def prepared(self) -> Prepared:
        """Return the recipe, resolved for the model."""
        return self.inputs.prepared

    @property
    def model(self) -> Any:
        """Return the model in its present state of compression."""
        return self.prepared.model

    @property
    def texts(self) -> Texts:
        """Return the token windows."""
        return self.inputs.texts

    # keys and stores ----------------------------------------------------------------------------------------

    def chained(self, last: str) -> dict[str, Any]:
        """Return everything that results of the stage `last`, and of those before it, depend on."""
        key = self.inputs.identity()
        for stage in self.stages:
            key |= stage.key(self)
            if stage.id == last:
                return key
        raise KeyError(last)

    def store(self, key: dict[str, Any]) -> Store:
        """Open the part of the run directory that belongs to a key."""
        team = processes()
        return self.run.store(key) if team.count == 1 else SharedStore(self.run.place(key), team)

    def environment(self) -> dict[str, Any]:
        """Return what rounding depends on, besides the inputs."""
        recipe = self.prepared.recipe
        return {
            "device": self.prepared.device.type,
            "compute": self.prepared.compute,
            "batch": recipe.batch_size,
            "resident": recipe.resident,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "slimrank": __version__,
        }

    # running ------------------------------------------------------------------------------------------------

    def runner(self, resident: bool) -> BlockRunner:
        """Return the model's blocks, as they are computed here."""
        prepared = self.prepared
        return BlockRunner(self.model, prepared.device, prepared.upcast, resident, prepared.bfloat16)

    def batches(self, name: str) -> Sequence[Batch]:
        """Return the windows of a request in batches; none if nobody asked for them."""
        windows = self.texts.get(name)
        return [] if windows is None else [Batch(ids) for ids in windows.split(self.prepared.recipe.batch_size)]

    @contextmanager
    def timed(self, title: str, steps: int) -> Iterator[None]:
        """Announce a part of that many steps; its seconds go into the report."""
        self.progress.stage(title, steps)
        start = time.perf_counter()
        yield
        self.seconds[title] = time.perf_counter() - start
